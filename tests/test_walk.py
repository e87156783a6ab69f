"""benchmarks/walk.py: it stops at a failure with what was printed, goes on from there, and walks the small model."""

import json
import sys

import pytest

from benchmarks import measured_process, walk, walk_tables

STAGES = ["float16", "bfloat16", "int8", "int4", "fp8", "kv", "sq", "sq_auto", "calibrated", "awq", "imported"]


def write(path, text="x"):
    return (sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r})")


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Three commands in place of the real ones; the second fails until the file `mended` is there."""
    engine, log = tmp_path / "v1_7b" / "engine", tmp_path / "log"
    failing = f"print('what went wrong'); import os, sys; sys.exit(not os.path.exists({str(tmp_path / 'mended')!r}))"
    made = f"import os; os.mkdir({str(engine)!r}); open({str(engine / 'rank')!r}, 'wb').write(bytes(200_000_000))"
    listed = [
        walk.Command("build", (sys.executable, "-c", made), engine),
        walk.Command("run", (sys.executable, "-c", failing), leaves=(engine,)),
        walk.Command("again", write(log)),
    ]
    monkeypatch.setattr(walk.Walk, "stages", lambda self: {"float16": listed})
    monkeypatch.setattr(walk, "checkpoint_command", lambda journey: walk.Command("checkpoint", write(log, "c")))
    return engine, log


def test_a_failure_ends_the_walk_and_the_same_line_goes_on(tmp_path, capsys, commands):
    engine, log = commands
    given = ["--folder", str(tmp_path)]
    assert walk.main(given) == walk.FAILED
    out, err = capsys.readouterr()
    assert "what went wrong" in out and "run failed: exit code 1" in err and engine.exists()
    (tmp_path / "mended").touch()
    assert walk.main(given) == 0
    assert log.read_text() == "cx", "what was done is not done again"
    assert not engine.exists(), "it goes when nobody needs it any more"
    state = json.loads((tmp_path / "v1_7b" / walk_tables.STATE).read_text())
    assert [line["name"] for line in state] == ["checkpoint", "build", "run", "again"]
    assert state[1]["written_gb"] == pytest.approx(0.2) and all(line["seconds"] > 0 for line in state)


def test_a_walk_of_another_size_is_refused(tmp_path, capsys, commands):
    given = ["--folder", str(tmp_path)]
    (tmp_path / "mended").touch()
    assert walk.main([*given, "--small"]) == 0
    capsys.readouterr()
    assert walk.main(given) == 2
    assert "holds a walk of v1_7b, 3 layers (small), and this one is of v1_7b, 32 layers" in capsys.readouterr().err
    assert walk.main([*given, "--small"]) == 0
    assert "commands walked before: 4" in capsys.readouterr().out, "nothing is walked, and that is said"


def test_on_another_machine_all_but_the_checkpoint_is_walked_again(tmp_path, monkeypatch, commands):
    (tmp_path / "mended").touch()
    assert walk.main(["--folder", str(tmp_path)]) == 0
    monkeypatch.setattr(walk, "machine", lambda *_: "v1_7b, 32 layers; another GPU")
    assert walk.main(["--folder", str(tmp_path)]) == 0
    assert (tmp_path / "log").read_text() == "cxx", "the checkpoint was made once"


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    assert walk.main(["--folder", str(tmp_path), "--only", "int5"]) == 2
    assert "--only int5 is no stage of this walk; choose among float16" in capsys.readouterr().err


def test_no_command_begins_after_the_limit(tmp_path, commands, capsys):
    assert walk.main(["--folder", str(tmp_path), "--limit_s", "1e-9"]) == 0
    assert "the same command line goes on with checkpoint" in capsys.readouterr().out


def test_a_process_that_hangs_is_ended_and_its_memory_is_seen(tmp_path):
    holds = "x = bytearray(300_000_000); print('holding', flush=True); import time; time.sleep(60)"
    done = measured_process.run([sys.executable, "-c", holds], tmp_path, timeout_s=3)
    assert done.code is None and done.output == "holding\n" and done.seconds < 20
    assert 0.3e9 < done.host_bytes < 0.5e9


@pytest.mark.parametrize("ranks", [(), (2, 4)])
def test_every_engine_goes_and_every_script_is_walked(tmp_path, ranks):
    stages = walk.Walk("v2_13b", tmp_path, False, ranks, tmp_path / "calibrated").stages()
    assert list(stages) == STAGES + ["replicas"] * bool(ranks) + [f"tp{each}" for each in ranks]
    listed = [command for stage in stages.values() for command in stage]
    assert len({command.name for command in listed}) == len(listed), "a name stands for one command"
    for commands in stages.values():
        assert {c.engine for c in commands if c.engine} == {left for c in commands for left in c.leaves}
    for script in ("build.py", "run.py", "summarize.py", "hf_baichuan_convert.py"):
        assert any(word.endswith(script) for command in listed for word in command.argv)


def test_walks_on_one_kind_of_machine_make_one_table(tmp_path, monkeypatch, capsys):
    def line(machine, name, seconds):
        return walk_tables.Line(machine, name, "python run.py", seconds, 1.0, 0.0, 0.04, "ready in 5 s")

    page = tmp_path / "walk.md"
    page.write_text(f"before\n{walk_tables.BEGIN}old\n{walk_tables.END}after\n")
    monkeypatch.setattr(walk_tables, "PAGE", page)
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    walk_tables.write_lines(one, [line("v1_7b; A", "run", 3.0), line("v1_7b; A", "build", 4.0)])
    walk_tables.write_lines(two, [line("v1_7b; A", "run", 2.0), line("v2_13b; A", "run", 5.0)])
    assert walk_tables.main(["--write", str(one), str(two)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("## ") == 2 and "| run | 2.0 | 1.0 |  |  | ready in 5 s |" in text and "3.0" not in text
    (tmp_path / "bad.json").write_text("[{}]")
    assert walk_tables.main([str(tmp_path / "bad.json")]) == 2
    assert "walk again" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1_7b", "v2_13b"], ids=["safetensors", ".bin"])
def test_the_small_model_is_walked_whole(tmp_path, version):
    check_small_walk(tmp_path, version)


@pytest.mark.cuda
@pytest.mark.parametrize("version", ["v1_7b", "v2_13b"], ids=["safetensors", ".bin"])
def test_the_small_model_is_walked_whole_on_a_gpu(tmp_path, version):
    """Every script as a process, from sharded files."""
    check_small_walk(tmp_path, version)


def check_small_walk(folder, version):
    program = [sys.executable, "benchmarks/walk.py", "--small", "--model_version", version, "--folder", str(folder)]
    done = measured_process.run(program, walk.ROOT, timeout_s=600)
    assert done.code == 0, done.output
    assert [path.name for path in (folder / version).glob("engine-*")] == [], "engines go as soon as they were used"
    for said in ("self-check against the float32 weights", "ms per step", "| summarize, both sides |"):
        assert said in done.output
