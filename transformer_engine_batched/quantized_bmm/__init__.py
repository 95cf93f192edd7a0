# SPDX-License-Identifier: Apache-2.0
"""`enable_quantized_bmm`: torch's batched products of two TE quantized tensors run in FP8.

From top to bottom: `switch` (the hook in TE's class), `calls` (which of torch's calls are taken), `products` (the FP8
products and their gradients), `transposed_view`. What is not taken goes where it went before: to TE, which dequantizes.
Must not read TE's private attributes.
"""
