"""The benchmark: the paper's experiments in miniature, and what goes beyond them.

`plan` and `experiments` say what is measured, `jobs` measures it, `runner` works through the jobs within a budget of
time, `store` keeps what was drawn and found; `summary`, `claims`, `tables` and `plots` say what it means.
"""
