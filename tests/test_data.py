"""The data that came with the tests is complete and unchanged."""

from hashlib import sha256

from tokenizer_files import DATA

UNLISTED = {"README.md", "SHA256SUMS", "tokenizers/make.py", "imported/make.py"}


def test_every_file_is_listed_with_its_sum():
    listed = dict(line.split("  ")[::-1] for line in (DATA / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(DATA).as_posix(): path for path in DATA.rglob("*") if path.is_file()}
    assert listed == {
        name: sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name not in UNLISTED
    }
