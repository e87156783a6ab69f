"""README.md in both of its languages."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
