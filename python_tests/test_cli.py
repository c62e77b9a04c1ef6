"""The command line: what each command does, and every bad input's one line and exit code."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint
from PIL import Image

from synergen_ext.cli import checks, main, measure, train
from synergen_ext.cli.console import printable
from synergen_ext.processing.pictures import MAX_PIXELS, load_picture

COMMANDS = ("demo", "generate", "chat", "train", "eval", "bench", "doctor")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (50, 30), (200, 30, 30)).save(path)
    return path


def run(capsys, *args):
    """Exit code, stdout and stderr of one command line."""
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *args):
    """The one line of a refusal: exit code 2, nothing on stdout."""
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, ""), (code, out, err)
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err


def child(*args, **options):
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "synergen_ext", *map(str, args)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


# ---- help -----------------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert [c for c in COMMANDS if not re.search(rf"^│ {c} ", out, re.MULTILINE)] == []
    assert "synergen demo" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(capsys, command):
    code, out, err = run(capsys, command, "-h")
    assert (code, err) == (0, "")
    assert f"synergen {command}" in out[out.index("Examples") :]


def test_no_command_prints_the_help(capsys):
    code, out, _ = run(capsys)
    assert code == 2 and "Commands" in out


def test_version(capsys):
    import synergen_ext

    assert run(capsys, "--version") == (0, f"synergen_ext {synergen_ext.__version__}\n", "")


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from synergen_ext.cli import main; main(['generate', '--help']);"
        "print('heavy:', [m for m in ('torch', 'numpy', 'transformers', 'PIL', 'yaml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("heavy: []\n")


# ---- generate -------------------------------------------------------------------------------------------------


def test_generate(capsys, tiny, tmp_path):
    out = tmp_path / "new" / "cat.png"
    args = ("generate", "a red cat", "--checkpoint", tiny, "--seed", 7, "--guidance", 3)
    assert run(capsys, *args, "-o", out) == (0, f"{out}\n", "")
    with Image.open(out) as saved:
        assert saved.size == (384, 384) and saved.mode == "RGB"
        text = dict(saved.text)
    assert text.pop("Software").startswith("synergen_ext ")
    assert text == {"prompt": "a red cat", "seed": "7", "guidance": "3.0", "weights": "float32"}


def test_generate_scale_one_saves_the_models_pixels(capsys, tiny, tmp_path):
    from synergen_ext.generation.pipeline import Pipeline

    out = tmp_path / "cat.png"
    assert run(capsys, "generate", "a red cat", "--checkpoint", tiny, "--scale", 1, "-o", out)[0] == 0
    painted = Pipeline.from_pretrained(tiny).paint("a red cat", seeds=0)[0]
    with Image.open(out) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(painted))
        assert saved.text["guidance"] == "3.0"  # the checkpoint's own


def test_generate_with_few_bits_and_previews(capsys, tiny, tmp_path, monkeypatch):
    from synergen_ext.cli import paint

    saved = []
    monkeypatch.setattr(paint, "save_picture", lambda picture, path, *rest: saved.append((path.name, picture)))
    base = ("generate", "a red cat", "--checkpoint", tiny, "--weights", "int4", "-n", 2, "-o", tmp_path / "cat.png")
    code, out, err = run(capsys, *base, "--preview", 2)
    assert (code, len(out.splitlines()), err) == (0, 2, "")
    names = [name for name, _ in saved]
    assert len(names) > 2 and names == ["cat-0.png", "cat-1.png"] * (len(names) // 2)
    assert (np.asarray(saved[0][1])[-1] == 255).all()
    code, out, err = run(capsys, *base[:4], "--weights", "int3")
    assert code == 2 and "int3" in err


def test_generate_count_goes_through_the_seeds(capsys, tiny, tmp_path):
    base = ("generate", "a red cat", "--checkpoint", tiny, "--scale", 1)
    code, out, err = run(capsys, *base, "-n", 3, "--seed", 5, "-o", tmp_path / "cat.png")
    names = [tmp_path / f"cat-{seed}.png" for seed in (5, 6, 7)]
    assert (code, out.splitlines(), err) == (0, [str(n) for n in names], "")
    run(capsys, *base, "--seed", 6, "-o", tmp_path / "single.png")
    five, six, _, single = (np.asarray(Image.open(n), int) for n in (*names, tmp_path / "single.png"))
    # Convolutions round differently in another batch: at most one level of 255.
    assert np.abs(single - six).max() <= 1 < np.abs(single - five).max()


def test_generate_keeps_a_prompt_in_any_script(capsys, tiny, tmp_path):
    out = tmp_path / "cat.png"
    assert run(capsys, "generate", "eine rote Katze: 红猫", "--checkpoint", tiny, "-o", out)[0] == 0
    assert Image.open(out).text["prompt"] == "eine rote Katze: 红猫"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "synergen generate: Missing argument 'prompt'."),
        (("",), "synergen generate: the prompt is empty"),
        ((" \n\t",), "synergen generate: the prompt is empty"),
        (("x" * 5000,), "the prompt must have at most 4096 characters, got 5000"),
        (("a cat \udcff",), "the prompt is not valid UTF-8"),
        (("a cat", "--seed", "-1"), "--seed must be in [0, 2^63 - 1], got -1"),
        (("a cat", "--seed", str(2**63)), f"--seed must be in [0, 2^63 - 1], got {2**63}"),
        (("a cat", "--seed", str(2**63 - 2), "-n", "3"), "--seed must be in [0, 2^63 - 3]"),
        (("a cat", "--seed", "two"), "Invalid value for '--seed': "),
        (("a cat", "--guidance", "nan"), "--guidance must be a number in [0, 50], got nan"),
        (("a cat", "--guidance", "inf"), "--guidance must be a number in [0, 50], got inf"),
        (("a cat", "--guidance", "-1"), "--guidance must be a number in [0, 50], got -1"),
        (("a cat", "--guidance", "51"), "--guidance must be a number in [0, 50], got 51"),
        (("a cat", "--count", "0"), "Invalid value for '--count'"),
        (("a cat", "--count", "1001"), "Invalid value for '--count'"),
        (("a cat", "--scale", "17"), "Invalid value for '--scale'"),
        (("a cat", "-o", "x.jpg"), "the output must be a .png file, got x.jpg"),
        (("a cat", "-o", "{file}/x.png"), "cannot write to the folder {file}: "),
        (("a cat", "-o", "{folder}"), "the output must be a file, and {folder} is a folder"),
        (("a cat", "--checkpoint", "{folder}/none"), "--checkpoint must be a folder, and {folder}/none is not there"),
        (("a cat", "--checkpoint", "{file}"), "--checkpoint must be a folder, and {file} is not a folder"),
        (("a cat", "--checkpoint", "{folder}"), "config: no config.json in {folder}"),
        (("a cat", "--size", "3"), "No such option: --size"),
        (("a cat", "a dog"), "unexpected extra argument"),
    ],
)
def test_generate_refuses(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    folder, file = tmp_path / "folder.png", tmp_path / "file"
    folder.mkdir()
    file.write_text("")
    names = {"folder": folder, "file": file}
    line = refused(capsys, "generate", *(a.format(**names) for a in args))
    assert message.format(**names) in line and line.startswith("synergen generate: ")
    assert not (tmp_path / "picture.png").exists()


def test_generate_refuses_a_long_prompt_in_tokens(capsys, tiny, tmp_path):
    line = refused(capsys, "generate", "q " * 300, "--checkpoint", tiny, "-o", tmp_path / "x.png")
    assert "prompt must be at most 256 tokens, got " in line


def test_broken_checkpoint(capsys, tiny, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    assert "is not a safetensors file" in refused(capsys, "generate", "a cat", "--checkpoint", broken)
    (broken / "config.json").write_text('{"hidden": 3}')
    assert "unknown field 'hidden'" in refused(capsys, "generate", "a cat", "--checkpoint", broken)


# ---- chat -----------------------------------------------------------------------------------------------------


def test_chat_answers(capsys, tiny, picture):
    from synergen_ext.generation.pipeline import Pipeline

    code, out, err = run(capsys, "chat", picture, "How many cars are there?", "--checkpoint", tiny)
    expected = Pipeline.from_pretrained(tiny).ask(load_picture(picture), "How many cars are there?")
    assert (code, out, err) == (0, f"{printable(expected)}\n", "")


def test_answers_cannot_steer_the_terminal():
    assert printable("two\x1b[2J cats\nund drei Hüte 猫") == "two\N{REPLACEMENT CHARACTER}[2J cats\nund drei Hüte 猫"


class Listener:
    """Stands in for a pipeline: repeats the question and how much it was reminded of."""

    def ask(self, picture, question, history=()):
        if question == "too much":
            raise ValueError("ask: the conversation must fit 10 tokens, got 11")
        return f"{question} after {[q for q, _ in history]}"


def test_chat_conversation(capsys, picture, monkeypatch):
    from synergen_ext.cli import chat

    monkeypatch.setattr(chat, "load_pipeline", lambda folder, weights: Listener())
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\ntoo much\nthree\nfour\n"))
    code, out, err = run(capsys, "chat", picture)
    assert code == 0
    assert out.splitlines() == [
        "one after []", "two after ['one']", "three after ['one', 'two']", "four after ['two', 'three']",
    ]  # fmt: skip
    assert err.splitlines() == ["the question is empty", "ask: the conversation must fit 10 tokens, got 11"]


def test_chat_without_memory(capsys, picture, monkeypatch):
    from synergen_ext.cli import chat

    monkeypatch.setattr(chat, "load_pipeline", lambda folder, weights: Listener())
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    assert run(capsys, "chat", picture, "--history", 0)[1].splitlines() == ["one after []", "two after []"]


def png_header(width, height):
    """A PNG that claims a size and holds a hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bad_pictures(folder):
    """Path and message of every kind of picture that is refused."""
    good = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(good, "PNG")
    whole = good.getvalue()
    files = {
        "empty.png": (b"", "is not a picture in PNG, JPEG"),
        "text.png": (b"not a picture", "is not a picture in PNG, JPEG"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not a picture in PNG"),
        "cut.png": (whole[: len(whole) // 2], "is broken: "),
        "flipped.png": (whole[:100] + bytes([whole[100] ^ 255]) + whole[101:], "is broken: "),
        "claims.png": (png_header(9000, 9000), f"must have at most {MAX_PIXELS} pixels, got 9000 x 9000"),
        "bomb.png": (png_header(60_000, 60_000), f"must have at most {MAX_PIXELS} pixels"),
        "thin.png": (png_header(2**31 - 1, 1), f"must have at most {MAX_PIXELS} pixels"),
    }
    for name, (data, message) in files.items():
        (folder / name).write_bytes(data)
        yield folder / name, message
    yield folder / "none.png", "is not there"
    yield folder, "is a folder"
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    yield folder / "pipe.png", "is not a regular file"


def test_chat_refuses_bad_pictures(capsys, tmp_path):
    for path, message in bad_pictures(tmp_path):
        line = refused(capsys, "chat", path, "What is this?")
        assert line.startswith(f"synergen chat: picture {path} ") and message in line, line


def test_chat_refuses_bad_words(capsys, tiny, picture):
    assert "the question is empty" in refused(capsys, "chat", picture, " ")
    assert "Missing argument 'picture'" in refused(capsys, "chat")
    line = refused(capsys, "chat", picture, "q " * 300, "--checkpoint", tiny)
    assert "question must be at most 256 tokens" in line


# ---- pictures -------------------------------------------------------------------------------------------------


def test_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert load_picture(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    path = tmp_path / "clear.png"
    if mode == "P":
        picture = Image.new("P", (8, 8), 3)
        picture.putpalette([0] * 12)  # four blacks, one of them clear
        picture.save(path, transparency=3)
    else:
        Image.new(mode, (8, 8), 0).save(path)
    picture = load_picture(path)
    assert picture.mode == "RGB" and picture.getextrema() == ((255, 255),) * 3


def test_deep_grey_keeps_its_brightness(tmp_path):
    Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert load_picture(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_every_named_format_opens(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (16, 16), (250, 10, 10)).save(path)
    got = load_picture(path)
    assert got.mode == "RGB" and got.size == (16, 16)
    assert np.abs(np.asarray(got, int) - (250, 10, 10)).max() < 12


# ---- train, eval, bench, doctor -------------------------------------------------------------------------------


def test_train_dry_run_of_the_packages_recipes(capsys, tmp_path):
    for path in sorted(train.RECIPES.glob("*.yaml")):
        code, out, err = run(capsys, "train", path.stem, "--out", tmp_path / "run", "--dry-run")
        assert (code, err) == (0, "") and out.startswith(f"{path.stem}: ") and "stage " in out
        assert not (tmp_path / "run").exists()


def test_train_runs_and_resumes(capsys, tmp_path, monkeypatch):
    calls = []
    from synergen_ext.training import run as training

    def run_recipe(path, out, resume=True, dry_run=False):
        calls.append((Path(path).name, Path(out).name, resume, dry_run))
        return out / "checkpoint"

    monkeypatch.setattr(training, "run_recipe", run_recipe)
    code, out, _ = run(capsys, "train", "demo", "--out", tmp_path / "mine")
    assert (code, out) == (0, f"Trained: {tmp_path / 'mine' / 'checkpoint'}\n")
    run(capsys, "train", "demo", "--out", tmp_path / "mine", "--no-resume")
    assert calls == [("demo.yaml", "mine", True, False), ("demo.yaml", "mine", False, False)]


RECIPE = """
name: mine
model: {preset: demo}
tokenizer: {model: {codebook_size: 64}}
stages:
  - {name: one, train: [vision], steps: 1, learning_rate: 1.0e-3, paint: 1}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("preset: demo", "preset: huge"), "preset must be one of tiny, demo, paper"),
        (("preset: demo", "layers: 3"), "config: unknown field 'layers'"),
        (("codebook_size", "codebok_size"), "recipe: tokenizer.model has no field 'codebok_size'"),
        (("paint: 1", "paint: 1, painting: 2"), "recipe: stages[0] has no field 'painting'"),
        (("name: mine", "nom: mine"), "recipe: recipe has no field 'nom'"),
        (("steps: 1", "steps: many"), "recipe: stages[0].steps must be int, got 'many'"),
        (("train: [vision]", "train: [sight]"), "train must be a list of some of vision, attention, language_model"),
        (("stages:", "stages: ]"), "is not YAML"),
    ],
)
def test_train_refuses_bad_recipes(capsys, tmp_path, change, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert run(capsys, "train", path, "--out", tmp_path / "run", "--dry-run")[0] == 0
    assert RECIPE.count(change[0]) == 1
    path.write_text(RECIPE.replace(*change))
    assert message in refused(capsys, "train", path, "--out", tmp_path / "run", "--dry-run")


def test_train_refuses_the_rest(capsys, tmp_path):
    assert "recipe none is neither a file nor one of the package's (demo" in refused(
        capsys, "train", "none", "--out", tmp_path / "run"
    )
    assert "Missing option '--out'" in refused(capsys, "train", "demo")
    (tmp_path / "file").write_text("")
    assert "cannot write to the folder" in refused(capsys, "train", "demo", "--out", tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    assert "is not empty" in refused(capsys, "train", "demo", "--out", tmp_path / "full", "--no-resume")


def test_doctor(capsys):
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    assert re.search(r"^ok   torch: ", out, re.MULTILINE) and "rms_norm" in out


def test_eval(capsys, tiny, tmp_path):
    path = tmp_path / "scores.json"
    args = ("--checkpoint", tiny, "--per-tag", 1, "--images", 1, "--guidance", 1.5, "--json", path)
    code, out, err = run(capsys, "eval", *args)
    assert (code, err) == (0, "")
    scores = json.loads(path.read_text())
    assert set(scores) == {"generation", "understanding", "tokenizer"}
    assert scores["generation"]["pictures"] == 6 and scores["generation"]["settings"]["guidance"] == 1.5
    assert scores["tokenizer"]["settings"]["n"] == 6
    assert all(name in out for name in ("single_object", "naming", "box_psnr"))


def test_figure_rows_take_the_intervals_with_them():
    figures = {"tags": {"colors": 0.25}, "overall": 0.5, "pictures": 3, "interval": {"colors": [0.1, 0.4]}}
    assert measure.figure_rows({"generation": figures}) == [
        ("generation", "colors", 0.25, (0.1, 0.4)), ("generation", "overall", 0.5, None),
    ]  # fmt: skip


SUITE = """
from synergen_ext.bench import Row

def rows(quick, progress):
    yield Row("speed", 3.0 if quick else 30.0, "s", "<= 15")
"""


def test_bench(capsys, tmp_path, monkeypatch):
    (tmp_path / "suite_small.py").write_text(SUITE)
    monkeypatch.setattr("synergen_ext.bench.suites_folder", lambda: tmp_path)
    path = tmp_path / "rows.json"
    code, out, err = run(capsys, "bench", "--suite", "small", "--json", path)
    assert (code, err) == (0, "") and "missed" in out
    assert json.loads(path.read_text())["rows"][0]["value"] == 30
    assert run(capsys, "bench", "--suite", "small", "--check")[0] == 1
    assert run(capsys, "bench", "--suite", "small", "--check", "--quick")[0] == 0
    assert "suite must be one of small, got 'large'" in refused(capsys, "bench", "--suite", "large")
    assert "the suite is empty" in refused(capsys, "bench", "--suite", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--exam", "drawing"), "Invalid value for '--exam'"),
        (("--per-tag", "101"), "Invalid value for '--per-tag'"),
        (("--images", "0"), "Invalid value for '--images'"),
        (("--guidance", "nan"), "--guidance must be a number in [0, 50], got nan"),
        (("--seed", "-3"), "--seed must be in [0, 2^63 - 4], got -3"),
        (("--checkpoint", "none"), "--checkpoint must be a folder, and none is not there"),
    ],
)
def test_eval_refuses(capsys, args, message):
    assert message in refused(capsys, "eval", *args)


# ---- failures of other kinds ----------------------------------------------------------------------------------


def test_unknown_command_and_option(capsys):
    assert refused(capsys, "xyz") == "synergen: No such command 'xyz'.\n"
    assert "Did you mean 'generate'?" in refused(capsys, "generat")
    assert "No such option: --verbose" in refused(capsys, "--verbose")


@pytest.mark.parametrize(("error", "line"), [
    (RuntimeError("it broke\nbadly"), "synergen doctor: RuntimeError: it broke badly; add --debug to see where\n"),
    (ImportError("synergen_ext._C is not built"), "synergen doctor: synergen_ext._C is not built\n"),
])  # fmt: skip
def test_unexpected_error_is_one_line_and_exit_1(capsys, monkeypatch, error, line):
    def fail():
        raise error

    monkeypatch.setattr("synergen_ext.doctor.report", fail)
    assert run(capsys, "doctor") == (1, "", line)
    code, _, err = run(capsys, "doctor", "--debug")
    assert code == 1 and err.startswith("Traceback") and "in fail" in err


def test_debug_shows_where_bad_input_was_refused(capsys):
    code, _, err = run(capsys, "--debug", "generate", "")
    assert code == 2 and "check_text" in err and err.endswith("synergen generate: the prompt is empty\n")
    # Behind `--` it is a prompt like any other.
    assert "is not there" in refused(capsys, "generate", "--checkpoint", "/none", "--", "--debug")


def test_interrupt_is_quiet(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("synergen_ext.doctor.report", interrupt)
    assert run(capsys, "doctor") == (130, "", "")


def test_interrupted_process(tiny, picture):
    # A test run in the background may have been told to ignore interrupts, and children inherit that.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = child("chat", picture, "--checkpoint", tiny, preexec_fn=listen)
    process.stdin.write("what?\n")
    process.stdin.flush()
    process.stdout.readline()  # the first answer is there: it waits for the next question
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) == (130, "")


def test_reader_that_goes_away():
    process = child("--help")
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate()
    assert err == "" and process.returncode in (0, 1)


def test_refusing_leaves_programming_errors_alone():
    with pytest.raises(KeyError), checks.refusing():
        raise KeyError("x")
    with pytest.raises(checks.BadInput, match="^sentence$"), checks.refusing():
        raise ValueError("sentence")


def test_json_output_is_checked_before_the_work(capsys, tmp_path):
    for command in (("eval",), ("bench", "--suite", "demo")):
        assert "the output must be a .json file" in refused(capsys, *command, "--json", tmp_path / "x.txt")
