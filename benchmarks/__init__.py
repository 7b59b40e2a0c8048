"""Benchmarks of grace_kernels and grace_edit: `python -m benchmarks`, see README.md.

__main__.py      the command line
suite.py         the parts of a run, the environment, one run from beginning to end
measurements.py  what a part returns, its files, the ratios between two measurements
timing.py        interleaved rounds, caches warm or cold, replays of a graph
gate.py          the right answers, and whether a contestant gives them
peers.py         what ours stand beside, on a CPU and on a GPU
operators.py     on a CPU: nearest, lookup, adapt_; call.py: what a call costs before any work
pruned.py        lookups through a sketch; activations.py: data like a pretrained model's
model.py         an edited GPT-2 beside the unedited one and published.py's way
edits.py         edits per second, growth of a codebook
gpu.py           what the parts on a GPU share; gpu_operators.py, gpu_pruned.py, gpu_edits.py:
                 these parts
goals.py         what was to be reached, and whether it was
page.py          the page, page_gpu.py its part for a GPU, page_summary.py what it begins with
page_edits.py    docs/generality.md, from what `make eval` measured
pictures.py      the pictures; markdown.py: tables
gpu_check.py     `make gpu-check`: build, pytest --gpu and these benchmarks, within a time
instructions/    instruction counts of fixed lookups beside committed ones, without a clock
"""
