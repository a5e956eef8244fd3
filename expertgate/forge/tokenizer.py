"""A small reversible byte-level BPE, learned from public text alone, and the chat template."""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from expertgate.forge.corpus import Example

END, PAD, SYSTEM, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# A word with the space before it, a single digit, or a run of signs: digits stay apart so that
# every number is spelt alike wherever it stands.
_PIECES = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+"


def learn(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Encoded:
    """An exchange in tokens: where its answer starts, and each sentence's value, as [start, stop).

    A value is what follows the words that restate the question, its full stop included.
    """

    ids: list[int]
    answer: int
    values: list[tuple[int, int]]


def encode(tokenizer: PreTrainedTokenizerFast, example: Example) -> Encoded:
    """The exchange through the chat template, its end included."""
    messages = [{"role": "user", "content": example.question}]
    if example.system:
        messages.insert(0, {"role": "system", "content": example.system})
    prompt = "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages) + ASSISTANT
    ids = tokenizer.encode(prompt)
    answer = len(ids)
    values = []
    for number, sentence in enumerate(example.sentences):
        space = " " if number else ""
        value = len(ids) + len(tokenizer.encode(space + sentence.lead))
        ids += tokenizer.encode(space + sentence.text)
        values.append((value, len(ids)))
    return Encoded([*ids, *tokenizer.encode(END)], answer, values)
