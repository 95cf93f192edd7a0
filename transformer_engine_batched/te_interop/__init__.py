# SPDX-License-Identifier: Apache-2.0
"""The only reader of Transformer Engine's private attributes.

Everything that the package knows of the inside of TE 2.20 is here, by the part of TE that it is about: `tensors`,
`quantizers`, `recipes`, `modules`. Each imports only from those named before it, and nothing of this package that
plans or runs products.
"""
