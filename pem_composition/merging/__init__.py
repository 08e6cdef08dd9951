"""Merging methods that need data: what is computed from rows, with a model.

``fisher`` and ``gram`` are statistics of one module on its own task; ``blend`` is a model whose
coefficients can be learned; ``learning`` learns them. The rules themselves are pure functions in
``arithmetic/methods``.
"""
