# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: one file for each job, with the launcher beside its kernel.

Inputs are torch tensors, outputs too: no module here knows of TE's tensor classes, recipes or
products. Nothing is imported here, so that Triton is loaded only where a kernel is used.
"""
