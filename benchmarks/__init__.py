# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the batched products; entry point `run.py`. The package never imports them."""
