"""What README and docs show is run: the examples as they stand, the commands, the links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from grace_kernels import backends

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
WORDS = [
    "The",
    "capital",
    "of",
    "Australia",
    "is",
    "Sydney",
    "Canberra",
    "Australia's",
    "has",
    "its",
    "in",
]


def blocks(page: str) -> list[tuple[str, str]]:
    """Return language and text of every block of code of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def small_gpt2(tmp_path: Path) -> Path:
    """Save a small GPT-2 with a word-level tokenizer and return its directory."""
    vocabulary = {word: n for n, word in enumerate(["<unk>", *(f"▁{w}" for w in WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(vocabulary),
                n_positions=32,
                n_embd=32,
                n_layer=3,
                n_head=2,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    directory = tmp_path / "small"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs a page's code in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}

    def execute(page: str, code: str) -> str:
        exec(compile(code, page, "exec"), space)
        return capsys.readouterr().out

    return execute


def test_the_ten_lines_of_the_readme_print_what_stands_below_them(run: Callable[..., str]) -> None:
    found = blocks("README.md")
    place = [language for language, _ in found].index("python")
    (_, code), (language, printed) = found[place : place + 2]
    assert language == "text"
    assert "editor.edit(" in code
    assert len([line for line in code.splitlines() if line]) <= 12
    assert len(printed.splitlines()) == 3
    assert run("README.md", code) == printed


def test_the_operators_in_how_it_works_print_what_stands_below_them(
    run: Callable[..., str],
) -> None:
    page = "docs/how-it-works.md"
    shown = [(language, text) for language, text in blocks(page) if language in ("python", "text")]
    assert [language for language, _ in shown] == ["python", "text"]
    assert run(page, shown[0][1]) == shown[1][1]


def test_a_model_of_your_own_is_edited_saved_and_served_as_the_docs_say(
    small_gpt2: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    page = "docs/serving.md"
    shown = [text for language, text in blocks(page) if language == "python"]
    edit, score, serve, share, layers, publish, keep = shown
    code = edit.replace('"gpt2"', repr(str(small_gpt2)))
    assert code != edit
    printed = run(page, code).splitlines()
    assert printed[0] == "True Canberra"
    assert "distance=" in printed[1]
    assert (tmp_path / "my-edits" / "codebook.safetensors").exists()
    assert run(page, score).split()[-1] == "True"
    assert run(page, serve).strip() == "Canberra"
    before = (tmp_path / "my-edits" / "edits.jsonl").read_text()
    run(page, share)
    assert len((tmp_path / "my-edits" / "edits.jsonl").read_text()) > len(before)
    refused, ids, answer = run(page, layers).splitlines()
    assert refused.startswith("False ")
    assert "edit 0 of layer transformer.h.2.mlp" in refused
    assert ids == "{'transformer.h.1.mlp': [1], 'transformer.h.2.mlp': [0]}"
    assert answer == "Canberra"
    assert run(page, publish).strip() == "Canberra"
    assert list((tmp_path / "my-edits").glob("edits-*.log"))
    run(page, keep)


def test_the_shell_commands_of_the_docs_edit_a_model_and_explain_the_edit(
    small_gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("typer", reason="the extra [cli] is not installed")
    pytest.importorskip("rich", reason="the extra [cli] is not installed")
    from grace_edit.cli import app

    monkeypatch.chdir(tmp_path)
    found = blocks("docs/serving.md")
    edits = next(text for language, text in found if language == "json")
    (tmp_path / "edits.jsonl").write_text(edits, encoding="utf-8")
    # Those that need no records to be measured on.
    commands = next(text for language, text in found if language == "sh")
    printed = []
    for line in commands.splitlines():
        words = shlex.split(line.replace("PATH_OR_ID", str(small_gpt2)))
        assert words[0] == "grace"
        with pytest.raises(SystemExit) as left:
            app(words[1:], prog_name="grace")
        printed.append(capsys.readouterr().out)
        assert left.value.code == 0, line
    assert len(printed) == 5
    assert all("Canberra" in text for text in printed)
    assert "live edits 0" in printed[-1]


def test_the_remedy_that_the_doctor_names_is_the_one_in_the_docs() -> None:
    command = backends._REMEDY["cpu"].rpartition(": ")[2]
    assert command.startswith("pip install ")
    assert [body for _, body in blocks("docs/install.md") if body == f"{command}\n"]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "benchmarks/README.md"])
def test_every_command_that_a_page_names_exists(page: str) -> None:
    typer = pytest.importorskip("typer", reason="the extra [cli] is not installed")
    from grace_edit.cli import app

    ours = typer.main.get_command(app).commands
    targets = re.findall(
        r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    extras = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"`([^`\n]+)`", text) + [body for _, body in blocks(page)])
    for command in re.findall(r"(?:^|`)grace ([a-z]+)\b", code, re.MULTILINE):
        assert command in ours
    for line in re.findall(r"^grace [a-z]+ .*$", code, re.MULTILINE):
        _, name, following = line.split()[:3]
        parts = getattr(ours[name], "commands", {})
        taken = [parts[following]] if following in parts else [ours[name], *parts.values()]
        known = {option for one in taken for param in one.params for option in param.opts}
        assert set(re.findall(r"--[a-z-]+", line)) <= known
    for target in re.findall(r"^make ([a-z-]+)", code, re.MULTILINE):
        assert target in targets
    for asked in re.findall(r'^pip install .*"\.\[([\w,]+)\]"', code, re.MULTILINE):
        assert set(asked.split(",")) <= set(extras)
    for module in re.findall(r"python -m (benchmarks[\w.]*)", code):
        assert (ROOT / module.replace(".", "/")).exists() or (
            ROOT / (module.replace(".", "/") + ".py")
        ).exists()


def headings(path: Path) -> set[str]:
    """Return the names by which a page's headings can be linked to."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".md" else []
    titles = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    here = [link.partition("#") for link in links if "://" not in link]
    missing = []
    for file, _, heading in here:
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (heading and heading not in headings(path)):
            missing.append(f"{file}#{heading}")
    assert missing == []
    assert page != "README.md" or len(here) >= 8
