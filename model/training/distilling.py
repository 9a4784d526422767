"""A static embedding model distilled from a sentence transformer: one vector a word piece, a text is their mean.

Each word piece is embedded alone by the teacher, the vectors are reduced by principal components, and frequent pieces
are weighted down (smooth inverse frequency, Arora et al. 2017, with real counts). Embedding is then a table look-up,
about two hundred times faster than the teacher, at some loss of quality.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

SMOOTHING = 1e-3
"""The constant of smooth inverse frequency: a piece of this share of all pieces gets half the weight of a rare one."""


def distil_embedder(teacher_name: str, texts: Sequence[str], dimension: int, target: Path) -> None:
    """Distils a static embedder and saves it as a sentence-transformers model in float16.

    Args:
        teacher_name: folder or name of the sentence transformer.
        texts: text for counting how frequent each word piece is.
        dimension: size of the vectors.
        target: folder to write.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    teacher = SentenceTransformer(teacher_name, device="cpu")
    tokenizer = Tokenizer.from_str(teacher.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    num_pieces = tokenizer.get_vocab_size()
    first, last = teacher.tokenizer.cls_token_id, teacher.tokenizer.sep_token_id
    vectors = []
    with torch.inference_mode():
        for start in range(0, num_pieces, 512):
            pieces = torch.arange(start, min(start + 512, num_pieces))
            ids = torch.stack((torch.full_like(pieces, first), pieces, torch.full_like(pieces, last)), 1)
            features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            vectors.append(teacher(features)["sentence_embedding"].float())
    table = torch.cat(vectors).numpy()
    table = table - table.mean(0)
    _, _, axes = np.linalg.svd(table, full_matrices=False)
    table = table @ axes[:dimension].T

    counts = np.ones(num_pieces)
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts += np.bincount(encoding.ids, minlength=num_pieces)
    shares = counts / counts.sum()
    table *= (SMOOTHING / (SMOOTHING + shares))[:, None]
    for token in (first, last, teacher.tokenizer.pad_token_id, teacher.tokenizer.unk_token_id):
        table[token] = 0.0

    static = StaticEmbedding(tokenizer, embedding_weights=table.astype(np.float32))
    student = SentenceTransformer(modules=[static, Normalize()], device="cpu").half()
    student.save_pretrained(str(target), create_model_card=False)
