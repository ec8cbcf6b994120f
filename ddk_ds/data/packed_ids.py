"""Token ids with as many bits as the vocabulary needs: packed with numpy, unpacked by torch on any device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def id_bits(vocab_size: int) -> int:
    """Return the number of bits of a token's id."""
    return max(1, (vocab_size - 1).bit_length())


def pack(ids: npt.NDArray[np.int64], bits: int) -> bytes:
    """Return the numbers of any shape with `bits` bits each, one behind the other, the lowest bit first.

    Zeros fill up the last group of eight numbers, which is `bits` whole bytes.
    """
    groups = -(-ids.size // 8)
    columns = np.zeros((groups, 8), np.uint64)
    columns.ravel()[: ids.size] = ids.ravel()
    packed = np.zeros(groups * bits + 8, np.uint8)
    for column, first_bit in enumerate(range(0, 8 * bits, bits)):
        byte, shift = divmod(first_bit, 8)
        shifted = columns[:, column] << np.uint64(shift)
        for place in range(-(-(shift + bits) // 8)):
            first = byte + place
            packed[first : first + groups * bits : bits] |= (shifted >> np.uint64(8 * place)).astype(np.uint8)
    return packed[: groups * bits].tobytes()


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers (8 * groups,) int64 of `pack`, from its bytes (groups * bits,) uint8."""
    groups = packed.view(-1, bits).T.contiguous().long()
    numbers = torch.empty(groups.shape[1], 8, dtype=torch.int64, device=packed.device)
    for column, first_bit in enumerate(range(0, 8 * bits, bits)):
        byte, shift = divmod(first_bit, 8)
        word = groups[byte] >> shift
        for place in range(1, -(-(shift + bits) // 8)):
            word = word | groups[byte + place] << (8 * place - shift)
        numbers[:, column] = word & (1 << bits) - 1
    return numbers.flatten()
