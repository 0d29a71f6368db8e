"""BERT's masking of rows of token ids.

Three numbers determine a row's mask: the seed, the row's number in the corpus (``sample_id``) and
which of the row's masks it is (``variant``, from 0).
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Draw(IntEnum):
    """What a row's random numbers are drawn for; each purpose has an independent generator."""

    MASK = 0
    WHETHER_MASKED = 1
    PAIR = 2


def row_generator(draw: Draw, seed: int, sample_id: int, variant: int = 0) -> np.random.Generator:
    """Return a random generator that is seeded from the arguments.

    Different arguments give independent generators.

    Args:
        draw: what the random numbers are for.
        seed: seed, below 2^32.
        sample_id: the row's number in the corpus.
        variant: which of the row's masks to draw, counted from 0.
    """
    # Philox is a counter-based generator: two keys give independent streams without any warm-up.
    # Without the dtype, numpy makes floats of a large and a small number, and keys collide.
    key = np.array([seed << 32 | variant, draw << 60 | int(sample_id)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class Masker:
    """BERT's masking: of the chosen tokens, 80 % become [MASK], 10 % a random token, 10 % stay.

    Args:
        mask_token_id: id of the mask token.
        vocab_size: random tokens are drawn from ``0 .. vocab_size - 1``.
        special_ids: ids that are never chosen ([CLS], [SEP], padding).
        probability: probability, 0 to 1, that a token is chosen if it is not special.
        seed: seed of the masks.

    Source: Devlin et al. 2019, "BERT", section 3.1, task 1.
    """

    def __init__(
        self,
        mask_token_id: int,
        vocab_size: int,
        special_ids: list[int],
        probability: float = 0.15,
        seed: int = 0,
    ) -> None:
        self.mask_token_id = mask_token_id
        self.vocab_size = vocab_size
        self.special_ids = np.array(special_ids, dtype=np.int64)
        self.probability = probability
        self.seed = seed

    def __call__(self, input_ids: IntArray, sample_id: int, variant: int = 0) -> IntArray:
        """Return a masked copy of a row, (length,); the same arguments and seed give the same copy.

        Args:
            input_ids: token ids, (length,).
            sample_id: the row's number in the corpus.
            variant: which of the row's masks to draw, counted from 0.
        """
        generator = row_generator(Draw.MASK, self.seed, sample_id, variant)
        draws = generator.random((2, len(input_ids)))
        random_ids = generator.integers(self.vocab_size, size=len(input_ids))
        chosen = (draws[0] < self.probability) & ~np.isin(input_ids, self.special_ids)
        masked = np.where(chosen & (draws[1] < 0.8), self.mask_token_id, input_ids)
        return np.where(chosen & (draws[1] >= 0.9), random_ids, masked)
