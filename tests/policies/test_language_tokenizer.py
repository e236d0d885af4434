"""Text becomes ids and comes back; ends are known; conversations only grow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from upslope.errors import UsageError
from upslope.policies.language.tokenizer import character_tokenizer, load_tokenizer, train_tokenizer

APPENDING = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRIPS_REASONING = APPENDING.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}",
)
KEEPS_LAST_THREE = APPENDING.replace("in messages", "in messages[-3:]")
DROPS_TOOLS = APPENDING.replace("in messages", "in messages if m['role'] != 'tool'")
OTHER_OPENING = APPENDING.replace("%}[assistant]{%", "%}[assistant] {%")
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + APPENDING
)

LETTERS = "0123456789+= \n\té𝄞?"
CONVERSATION = [
    {"role": "system", "content": "You add."},
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "<think>tool</think>call"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "4+5?"},
]


def chatting(template: str):
    tokenizer = train_tokenizer([APPENDING], 280)
    tokenizer.backend.chat_template = template
    return tokenizer


@given(text=st.text(LETTERS, max_size=40))
@settings(max_examples=50, deadline=None)
def test_characters_come_back_one_token_each(text: str) -> None:
    tokenizer = character_tokenizer(LETTERS)
    ids = tokenizer.encode(text)
    assert ids == [1 + LETTERS.index(character) for character in text]
    assert tokenizer.decode(ids) == text


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40).filter(lambda text: "<|end|>" not in text))
@settings(max_examples=50, deadline=None)
def test_trained_tokens_come_back_as_any_text(text: str) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat, the cat"] * 3, 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the cat")) < 7


def test_the_end_token_is_written_only_when_asked_for() -> None:
    tokenizer = character_tokenizer("ab")
    assert (tokenizer.end_token, tokenizer.end, tokenizer.size, tokenizer.begin) == (0, frozenset({0}), 3, ())
    assert tokenizer.decode([1, 2, 0]) == "ab"
    assert tokenizer.decode([1, 2, 0], special=True) == "ab<|end|>"
    assert tokenizer.encode("a<|end|>") == [1, 0]
    assert tokenizer.pieces([2, 0]) == ["b", "<|end|>"]


def test_a_character_outside_the_alphabet_is_named(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("0123456789")
    tokenizer.save(tmp_path)
    for each in (tokenizer, load_tokenizer(tmp_path)):
        with pytest.raises(UsageError, match="no token for 'x' in '1x2'"):
            each.encode("1x2")
        assert each.encode("7<|end|>") == [8, 0]


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    for number, tokenizer in enumerate((character_tokenizer(LETTERS), train_tokenizer(["a b c"], 260))):
        folder = tmp_path / str(number)
        tokenizer.save(folder)
        other = AutoTokenizer.from_pretrained(folder)
        text = " 12 + 3\n=\té "
        assert other(text).input_ids == tokenizer.encode(text)
        assert other.decode(tokenizer.encode(text)) == text
        assert (other.eos_token_id, len(other)) == (tokenizer.end_token, tokenizer.size)
        assert tokenizer.files() == {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_sizes_and_alphabets_that_make_no_tokenizer_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 257"):
        train_tokenizer(["text"], 256)
    with pytest.raises(UsageError, match="alphabet is empty"):
        character_tokenizer("")
    assert character_tokenizer("aba").size == 3


def test_all_configured_ends_end(tmp_path: Path) -> None:
    character_tokenizer("abc").save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert load_tokenizer(tmp_path).end == {0, 3}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    found = load_tokenizer(tmp_path)
    assert (found.end, found.end_token) == ({0, 1, 2}, 0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 4}))
    with pytest.raises(UsageError, match=r"end tokens \[4\] are no tokens"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_needs_one_named(tmp_path: Path) -> None:
    character_tokenizer("abc").save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    with pytest.raises(UsageError, match=r"no end token.*model\.end_token"):
        load_tokenizer(tmp_path)
    found = load_tokenizer(tmp_path, end_token="c")
    assert (found.end_token, found.end) == (3, {3})
    again = tmp_path / "again"
    found.save(again)
    assert load_tokenizer(again).end_token == 3
    with pytest.raises(UsageError, match="'d' is no token"):
        load_tokenizer(tmp_path, end_token="d")


def test_truncation_and_padding_of_a_saved_tokenizer_are_off(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("ab")
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).encode("aabb") == [1, 1, 2, 2]


def test_what_the_tokenizer_wants_before_a_text_is_put_there_once(tmp_path: Path) -> None:
    character_tokenizer("^ab").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "^", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"^": {"id": "^", "ids": [1], "tokens": ["^"]}},
    }
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.begin == (1,)
    assert tokenizer.encode("ab") == [2, 3]
    assert tokenizer.encode_prompt("ab") == tokenizer.encode_prompt("^ab") == [1, 2, 3]


def test_a_conversation_is_rendered_by_the_template() -> None:
    tokenizer = chatting(APPENDING)
    ids = tokenizer.render(CONVERSATION[1:2])
    assert tokenizer.decode(ids, special=True) == "[user]1+2?<|end|>[assistant]"
    assert tokenizer.decode(tokenizer.render(CONVERSATION[1:2], generation_prompt=False)) == "[user]1+2?"
    with pytest.raises(UsageError, match="has no chat template"):
        character_tokenizer("ab").render(CONVERSATION)


def test_a_template_that_appends_passes() -> None:
    chatting(APPENDING).check_appending(CONVERSATION)
    chatting(REFUSES_SYSTEM).check_appending(CONVERSATION[1:])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRIPS_REASONING, "rewrites history: with turn 4 .*'<think>.*becomes 'call"),
        (KEEPS_LAST_THREE, r"rewrites history: with turn 4 \(tool\), token 1 on, 'system.* becomes 'user"),
        (DROPS_TOOLS, "drops or rewrites what the tool says: '3'"),
        (OTHER_OPENING, r"turn 3 \(assistant\) after the prompt for it"),
        (REFUSES_SYSTEM, r"refuses a conversation of \(system, user\): no system turn"),
    ],
    ids=["strips", "keeps-three", "drops", "opening", "refuses"],
)
def test_a_template_that_rewrites_or_drops_is_refused(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chatting(template).check_appending(CONVERSATION)


def test_importing_upslope_imports_no_transformers() -> None:
    heavy = "{'transformers', 'tokenizers', 'peft', 'huggingface_hub'} & set(sys.modules)"
    code = f"import sys, upslope, upslope.policies.language.tokenizer, upslope.policies.language.model; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_id_without_a_token_has_no_text() -> None:
    assert character_tokenizer("ab").decode([1, 7, 2]) == "ab"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"no tokenizer could be loaded from the folder {tmp_path}"):
        load_tokenizer(tmp_path)


def test_a_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'upslope\[language\]'"):
        character_tokenizer("ab")
