"""What counts in a sample, and data that cannot be used."""

import json

import pytest
from byte_tokenizer import END, byte_tokenizer
from tokenizers.processors import TemplateProcessing

from moe_runtime.train.data.samples import IGNORED
from upcycle.errors import UpcycleError
from upcycle.upit.data import draw_seed_set, load_data

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def file(tmp_path):
    """`file(content)`: JSON lines of a list, else text."""

    def write(content, name=None):
        lines = isinstance(content, list)
        path = tmp_path / (name or ("data.jsonl" if lines else "data.txt"))
        path.write_text("\n".join(json.dumps(line) for line in content) if lines else content)
        return path

    return write


def spoken(tokenizer, sample):
    """The text whose tokens count; the end of a text as <end>."""
    return tokenizer.decode([label for label in sample.labels_L.tolist() if label != IGNORED])


def test_completions_count_with_their_end(tokenizer, file):
    (sample,) = load_data([file([{"prompt": "Say a: ", "completion": "aaa"}])], tokenizer, 64).samples
    assert tokenizer.decode(sample.ids_L) == "Say a: aaa<end>"
    assert spoken(tokenizer, sample) == "aaa<end>"
    assert sample.ids_L[-1] == sample.labels_L[-1] == END


def test_assistants_messages_count(chat_tokenizer, file):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "TWO"},
    ]
    (sample,) = load_data([file([{"messages": messages}])], chat_tokenizer, 200).samples
    whole = "<system>S|<user>one|<assistant>ONE|<user>two|<assistant>TWO|"
    assert chat_tokenizer.decode(sample.ids_L) == whole
    assert spoken(chat_tokenizer, sample) == "ONE|TWO|"


def test_only_prompts_begin_with_the_token_for_a_beginning(chat_tokenizer, file):
    """A chat template writes it itself where its model wants one; blocks of a text are no beginnings."""
    begins = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", END)])
    chat_tokenizer.backend_tokenizer.post_processor = begins
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    lines = [{"prompt": "p", "completion": "c"}, {"messages": messages}]
    instructions, chat = load_data([file(lines)], chat_tokenizer, 99).samples
    assert chat_tokenizer.decode(instructions.ids_L) == "<end>pc<end>"
    assert chat_tokenizer.decode(chat.ids_L) == "<user>u|<assistant>a|"
    (text,) = load_data([file("text")], chat_tokenizer, 99).samples
    assert chat_tokenizer.decode(text.ids_L) == "text"


def test_text_is_cut_into_blocks_that_count_whole(tokenizer, file):
    data = load_data([file("abcdefghij\n")], tokenizer, 4)
    assert [tokenizer.decode(sample.ids_L) for sample in data.samples] == ["abcd", "efgh", "ij\n"]
    assert [spoken(tokenizer, sample) for sample in data.samples] == ["abcd", "efgh", "ij\n"]
    assert data.num_tokens == 11


def test_samples_without_anything_that_counts_are_left_out(tokenizer, file):
    lines = [{"prompt": "p" * 10, "completion": "c"}, {"prompt": "p", "completion": "cc"}]
    data = load_data([file(lines)], tokenizer, 8)
    assert (len(data.samples), data.left_out) == (1, 1)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "data.txt is empty"),
        (" \n ", "data.txt is empty"),
        ("a", r"got none in .*data.txt"),
        ([3], r"line 1: must be one JSON object, got int"),
        ([{"prompt": "a"}], r"line 1: must have 'prompt' and 'completion', both texts, or 'messages'"),
        ([{"prompt": "a", "completion": "b"}, {"messages": "hi"}], r"line 2: must have 'prompt'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "'messages' need a chat template"),
        ([{"prompt": "a" * 99, "completion": "b"}], r"that count within max_length \(64\), got none"),
    ],
)
def test_data_without_samples_is_refused(content, sentence, tokenizer, file):
    with pytest.raises(UpcycleError, match=sentence):
        load_data([file(content)], tokenizer, 64)


def test_files_that_cannot_be_read_are_named(tokenizer, file, tmp_path):
    with pytest.raises(UpcycleError, match=r"there is no file .*nowhere.txt"):
        load_data([tmp_path / "nowhere.txt"], tokenizer, 64)
    with pytest.raises(UpcycleError, match="line 1: must be one JSON object"):
        load_data([file("{'prompt'", "data.jsonl")], tokenizer, 64)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UpcycleError, match="cannot be read as UTF-8 text"):
        load_data([tmp_path / "latin.txt"], tokenizer, 64)


def test_a_template_that_rewrites_earlier_messages_is_refused(chat_tokenizer, file):
    chat_tokenizer.chat_template = "{{ messages | length }}" + CHAT
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UpcycleError, match="the chat template rewrites earlier messages"):
        load_data([file([{"messages": messages}])], chat_tokenizer, 64)


def test_the_seed_set_is_a_share_without_repetition():
    places = draw_seed_set(100, 0.2, 3, 4, 1)
    assert len(set(places)) == 20
    assert places == sorted(places) == draw_seed_set(100, 0.2, 3, 4, 1)
    assert places != draw_seed_set(100, 0.2, 4, 4, 1)


def test_a_seed_fraction_with_fewer_samples_than_experts_is_refused():
    sentence = r"for each of the 8 experts, but 0.01 of 500 samples are 5; set it to 0.016 or more"
    with pytest.raises(UpcycleError, match=sentence):
        draw_seed_set(500, 0.01, 0, 8, 1)
    assert len(draw_seed_set(48, 0.5, 0, 8, 3)) == 24
    with pytest.raises(
        UpcycleError, match=r"min_per_expert \(4\) samples for each of the 8 .* 0.666667 or more"
    ):
        draw_seed_set(48, 0.5, 0, 8, 4)
    with pytest.raises(UpcycleError, match=r"0.5 of 48 samples are 24; take more data or fewer experts"):
        draw_seed_set(48, 0.5, 0, 8, 7)
