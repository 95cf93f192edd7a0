# SPDX-License-Identifier: Apache-2.0
"""Slow, obvious torch code that says what every recipe computes, bit for bit, on any device.

Inputs are torch tensors and Transformer Engine quantizers. Must not import the compiled extension,
the planner or the public entry points: everything above is checked against this package.
"""
