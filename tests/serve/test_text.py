"""Streaming and conversation, with a small random model and a byte-level tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nsa.serve import text
from nsa.serve.text import Chat, TextModel
from nsa.train.tokenizer import train_tokenizer

POSITIONS = 64
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer(chat_template=None):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
    )
    return TextModel(model=LlamaForCausalLM(config).eval(), tokenizer=byte_tokenizer())


def stream(loaded, prompt="The sea", **options):
    pieces = []
    return loaded.stream(prompt, on_text=pieces.append, **options), pieces


def test_the_pieces_are_the_text_and_the_text_is_greedy_generation(loaded):
    made, pieces = stream(loaded, max_new_tokens=20, temperature=0)
    assert len(pieces) > 0
    assert "".join(pieces) == made.text
    ids = loaded.tokenizer("The sea", return_tensors="pt").input_ids
    expected = loaded.model.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert made.text == loaded.tokenizer.decode(expected[0, ids.shape[1] :])
    assert (made.num_prompt_tokens, made.num_new_tokens) == (7, 20)


def test_a_prompt_begins_with_the_start_token_once(monkeypatch):
    tokenizer = train_tokenizer(["The sea, the sea"], vocab_size=258)
    start = tokenizer.bos_token_id
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=258, num_attention_heads=2, **sizes, eos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    read = []
    real = model.generate

    def generate(input_ids, **options):
        read.append(input_ids.tolist())
        return real(input_ids, **options)

    monkeypatch.setattr(model, "generate", generate)
    loaded = TextModel(model=model, tokenizer=tokenizer)
    made, _ = stream(loaded, max_new_tokens=4, temperature=0)
    bare = tokenizer("The sea", add_special_tokens=False)["input_ids"]
    assert read == [[[start, *bare]]]
    assert made.num_prompt_tokens == len(bare) + 1
    talk = Chat(loaded=loaded)
    talk.reply("Hi", on_text=lambda _: None, max_new_tokens=2, temperature=0)
    talk.reply("You", on_text=lambda _: None, max_new_tokens=2, temperature=0)
    assert [ids[0].count(start) for ids in read] == [1, 1, 1]


def test_a_seed_repeats_a_sample_and_another_gives_another(loaded):
    first, again, other = (
        stream(loaded, max_new_tokens=20, temperature=1.0, seed=seed)[0].text for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_tiny_mass_leaves_only_the_likeliest_token(loaded):
    greedy, _ = stream(loaded, max_new_tokens=20, temperature=0)
    narrow, _ = stream(loaded, max_new_tokens=20, temperature=1.0, top_p=1e-6)
    assert narrow.text == greedy.text


def test_the_default_fills_what_the_positions_leave(loaded):
    made, _ = stream(loaded, temperature=0)
    assert made.num_new_tokens == POSITIONS - 7


def test_summary_is_one_line():
    made = text.Generation("", 12, 200, 4.0)
    assert made.summary() == "12 + 200 tokens in 4.0 s (50.0 tokens/s)"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        pytest.param("", {}, "prompt: expected at least one token, got an empty text", id="empty"),
        pytest.param(
            "x" * POSITIONS,
            {},
            "prompt: 64 tokens and 1 new ones need more than .* max_position_embeddings = 64",
            id="prompt-too-long",
        ),
        pytest.param(
            "x" * 60,
            {"max_new_tokens": 5},
            "prompt: 60 tokens and 5 new ones .* Shorten the prompt or ask for fewer tokens",
            id="answer-too-long",
        ),
    ],
)
def test_what_does_not_fit_is_refused(loaded, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        stream(loaded, prompt, **options)


def test_chat_without_a_template_continues_one_transcript(loaded):
    talk = Chat(loaded=loaded)
    assert "no chat template" in talk.introduction()
    first = talk.reply("Hello", on_text=lambda _: None, max_new_tokens=4, temperature=0)
    second = talk.reply("You", on_text=lambda _: None, max_new_tokens=4, temperature=0)
    prompt = f"Hello\n{first.text}\nYou\n"
    assert second.text == stream(loaded, prompt, max_new_tokens=4, temperature=0)[0].text


def test_chat_with_a_template_keeps_roles(loaded):
    talk = Chat(loaded=TextModel(model=loaded.model, tokenizer=byte_tokenizer(TEMPLATE)))
    assert "no chat template" not in talk.introduction()
    first = talk.reply("Hi", on_text=lambda _: None, max_new_tokens=4, temperature=0)
    assert first.text == stream(loaded, "<u>Hi<a>", max_new_tokens=4, temperature=0)[0].text
    assert talk.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.text},
    ]


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["transcript", "template"])
def test_a_message_that_fails_leaves_the_conversation_as_it_was(loaded, template):
    talk = Chat(loaded=TextModel(model=loaded.model, tokenizer=byte_tokenizer(template)))
    talk.reply("Hi", on_text=lambda _: None, max_new_tokens=2, temperature=0)
    before = list(talk.messages)
    with pytest.raises(ValueError, match="Shorten the prompt"):
        talk.reply("x" * 100, on_text=lambda _: None)
    assert (talk.messages, talk.num_forgotten) == (before, 0)


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["transcript", "template"])
@pytest.mark.parametrize("max_new_tokens", [None, 20])
def test_a_full_conversation_forgets_its_oldest_turns(loaded, template, max_new_tokens):
    talk = Chat(loaded=TextModel(model=loaded.model, tokenizer=byte_tokenizer(template)))
    options = {"max_new_tokens": max_new_tokens, "temperature": 0}
    made = []
    for word in ("one", "two", "three", "four"):
        made.append(talk.reply(f"Say {word}", on_text=lambda _: None, **options))
        # Without any history the answer to "Say three" has 64 - 16 positions.
        assert made[-1].num_new_tokens >= (max_new_tokens or (POSITIONS - 16) // 2)
    assert 0 < talk.num_forgotten < 4
    kept = ["one", "two", "three", "four"][talk.num_forgotten :]
    assert [m["content"] for m in talk.messages[::2]] == [f"Say {word}" for word in kept]
    assert talk.messages[-1] == {"role": "assistant", "content": made[-1].text}


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["transcript", "template"])
def test_text_that_is_not_utf8_is_refused(loaded, template):
    message = r"^prompt: expected UTF-8 text, got '\\udcff' at character 1\.$"
    with pytest.raises(ValueError, match=message):
        stream(loaded, "a\udcff")
    talk = Chat(loaded=TextModel(model=loaded.model, tokenizer=byte_tokenizer(template)))
    with pytest.raises(ValueError, match=message):
        talk.reply("a\udcff", on_text=lambda _: None)
    assert talk.messages == []


def test_room_is_what_stream_makes_at_most(loaded):
    assert loaded.room("The sea") == loaded.room(list(range(7))) == POSITIONS - 7
    assert loaded.room("The sea", 5) == 5
    assert loaded.room("x" * POSITIONS) == loaded.room("x" * 60, 5) == loaded.room("") == 0


def test_load_puts_a_saved_model_on_the_device_ready_to_generate(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = text.load(tmp_path, device=torch.device("cpu"))
    assert not again.model.training
    made, expected = (
        stream(which, max_new_tokens=8, temperature=0)[0].text for which in (again, loaded)
    )
    assert made == expected


def test_a_prompt_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"a \xe9clair")
    with pytest.raises(ValueError, match=r"prompt\.txt: expected UTF-8 text, byte 2 is not"):
        text.read_prompt(path)
    path.write_text("café", encoding="utf-8")
    assert text.read_prompt(path) == "café"
