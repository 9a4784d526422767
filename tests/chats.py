"""A small random model that can be talked to, for the tests of alignment."""

from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model.checkpoint import Checkpoint, wrap_model
from model.tokenizing import CheckpointTokenizer
from model.training.chat import DEFAULT_MARKERS, ChatTemplate
from tests.models import make_checkpoint


def make_chat_tokenizer(special_tokens: tuple[str, ...] = DEFAULT_MARKERS) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of 512 tokens; 1 is ``<s>``, 2 is ``</s>``, the special tokens follow."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([topics[name] for name in sorted(topics)[:20]], trainer)
    return bpe


def wrap_tokenizer(tokenizer: Tokenizer, template: str | None = None) -> PreTrainedTokenizerFast:
    """Returns a tokenizer as transformers would load it."""
    text = tokenizer.to_str()
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), bos_token="<s>", eos_token="</s>", chat_template=template
    )


def make_chat_checkpoint(template: str | None = None) -> tuple[Checkpoint, ChatTemplate]:
    """Returns a random Llama of 4 layers and its chat template, the default one if none is given."""
    bpe = make_chat_tokenizer()
    chat = ChatTemplate(wrap_tokenizer(bpe, template), [1])
    model = make_checkpoint("llama").model
    model.config.eos_token_id = 2
    return wrap_model(model, CheckpointTokenizer(bpe), bos_token_id=1), chat
