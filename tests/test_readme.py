"""The README's example runs as it stands, on a small model in place of the one it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

README = Path(__file__).parents[1] / "README.md"
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


def test_the_ten_lines_of_the_readme_run_and_the_edit_answers(
    small_gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = blocks[0].replace('"gpt2"', repr(str(small_gpt2)))
    assert code != blocks[0]
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), space)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "True Sydney"
    assert "distance=" in printed[1]
    assert (tmp_path / "my-edits" / "codebook.safetensors").exists()


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/performance.md"]
)
def test_what_a_page_links_to_is_there(page: str) -> None:
    folder = (README.parent / page).parent
    links = re.findall(r"\]\(([^)#]+)", (README.parent / page).read_text(encoding="utf-8"))
    here = [link for link in links if "://" not in link]
    assert [link for link in here if not (folder / link).exists()] == []
    assert page != "README.md" or len(here) >= 2
