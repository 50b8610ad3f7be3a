"""The hot tensor code: each operation has a reference of a few lines and faster forms that are held to it.

`OPERATIONS` is the one table from an operation's name to its forms, best first, the reference last;
`dispatch.choose_form` picks one by device, dtype and shape, after its check has passed. AVALAB_KERNELS=reference forces
the references everywhere.
"""

from __future__ import annotations

from avalab.kernels.dispatch import Form, verdicts
from avalab.kernels.encoding import ENCODE, encode
from avalab.kernels.lora import LORA, linear
from avalab.kernels.loss import CROSS_ENTROPY, KL, linear_cross_entropy, linear_kl
from avalab.kernels.loss_sparse import SPARSE, linear_sparse
from avalab.kernels.loss_tokens import LOG_PROBABILITIES, linear_log_probabilities
from avalab.kernels.packed import product as packed_product
from avalab.kernels.product import DECODE, PRODUCT, TRANSPOSED, multiply, multiply_transposed
from avalab.kernels.product import prepare_small_batches as prepare
from avalab.kernels.weight import NestedScales, Weight4, decode, from_bitsandbytes, from_encoded
from avalab.kernels.weight import checked_scales as checked

OPERATIONS: dict[str, tuple[Form, ...]] = {
    "encode": ENCODE,
    "decode": DECODE,
    "product": PRODUCT,
    "product_transposed": TRANSPOSED,
    "lora": LORA,
    "linear_cross_entropy": CROSS_ENTROPY,
    "linear_kl": KL,
    "linear_sparse": SPARSE,
    "linear_log_probabilities": LOG_PROBABILITIES,
    "packed_decode": packed_product.DECODE,
    "packed_product": packed_product.PRODUCT,
    "packed_transposed": packed_product.TRANSPOSED,
}

__all__ = [
    "OPERATIONS",
    "NestedScales",
    "Weight4",
    "checked",
    "decode",
    "encode",
    "from_bitsandbytes",
    "from_encoded",
    "linear",
    "linear_cross_entropy",
    "linear_kl",
    "linear_log_probabilities",
    "linear_sparse",
    "multiply",
    "multiply_transposed",
    "prepare",
    "verdicts",
]
