# SPDX-License-Identifier: Apache-2.0
"""`te.TriangleMultiplication`: the triangle multiplicative update.

From top to bottom: `block` (the module and its choice between two pipelines), `autograd` (the fused one: kernels around
a product, and its backward), `bounds` (scales from the weights alone), `weights` (their names in public models).
"""
