"""Benchmarks of grace_kernels and grace_edit; installed as `grace_bench`, run by `grace bench`.

suite.py       the parts, the environment, one run from beginning to end
rows.py        what a part returns: rows, their files, the ratios between them
timing.py      interleaved rounds, warm and cold caches, the bandwidth of reading
gate.py        the right answers, and whether a contestant gives them
operators.py   parts nearest, lookup and adapt_; peers.py is what they stand beside
call.py        part call: what a call costs before any work
pruned.py      part pruned: lookups through a sketch
model.py       part model: an edited GPT-2 beside the unedited one and published.py's way
edits.py       parts edits and growth
activations.py data like a pretrained model's activations
goals.py       what was to be reached, and whether it was
page.py        the page from rows, markdown.py its tables, on_gpu.py its part for a GPU
pictures.py    the pictures from rows
gpu.py         the run on a GPU: the times of gpu_check/ as rows
gpu_check/     builds, checks and measures the GPU kernels
check_aot.py   compiles the Triton kernel without a GPU
instructions/  instruction counts of fixed lookups beside committed ones, without a clock
"""
