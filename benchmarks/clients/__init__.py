"""Recommender libraries that train with recattn: `make clients [ONLY="recbole rectools"]`.

`run.py` makes an environment for each library, runs its script there and writes the table in docs/integrations.md. A
script trains a stock model and the same model with our attention, by the library's own trainer and public API.
`comparison.py` has what the scripts share. It is a proof that each integration trains, not a claim about quality.
"""
