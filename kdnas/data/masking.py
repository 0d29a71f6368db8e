"""Masked inputs that depend on no worker, order or epoch: a mask is a function of (seed, sample id, variant)."""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kdnas.system.errors import UserError

IntArray = npt.NDArray[np.int64]


class Draw(IntEnum):
    """What is drawn for a row; each has its own key space."""

    MASK = 0
    WHETHER_MASKED = 1
    PAIR = 2


def row_generator(draw: Draw, seed: int, sample_id: int, variant: int = 0) -> np.random.Generator:
    """The random numbers of one row: the same for the same arguments, independent of all others."""
    # Philox is a counter-based generator: two keys give independent streams without any warm-up.
    # uint64 by name: of one large and one small number numpy makes floats, and neighbouring keys become one.
    key = np.array([seed << 32 | variant, draw << 60 | int(sample_id)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class Masker:
    """BERT's masking: of the chosen tokens 80 % become the mask token, 10 % a random one, 10 % stay.

    Args:
        mask_token_id: id of the mask token.
        vocab_size: random tokens are drawn from ``0 .. vocab_size - 1``.
        special_ids: ids that are never chosen ([CLS], [SEP], padding).
        probability: share of the other tokens that is chosen, 0 to 1. 0 leaves every row as it is.
        seed: another seed gives other masks.

    Raises:
        UserError: the probability is not in 0..1.

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
        if not 0 <= probability <= 1:
            raise UserError(f"mask_probability is {probability}: give a share between 0 and 1.")
        self.mask_token_id = mask_token_id
        self.vocab_size = vocab_size
        self.special_ids = np.array(special_ids, dtype=np.int64)
        self.probability = probability
        self.seed = seed

    def __call__(self, input_ids: IntArray, sample_id: int, variant: int = 0) -> IntArray:
        """The masked copy of one row.

        Args:
            input_ids: token ids, shape (length,).
            sample_id: the row's number in the corpus.
            variant: which of the row's masks.

        Returns:
            Token ids, shape (length,); the same for the same arguments, always.
        """
        generator = row_generator(Draw.MASK, self.seed, sample_id, variant)
        draws = generator.random((2, len(input_ids)))
        random_ids = generator.integers(self.vocab_size, size=len(input_ids))
        chosen = (draws[0] < self.probability) & ~np.isin(input_ids, self.special_ids)
        masked = np.where(chosen & (draws[1] < 0.8), self.mask_token_id, input_ids)
        return np.where(chosen & (draws[1] >= 0.9), random_ids, masked)
