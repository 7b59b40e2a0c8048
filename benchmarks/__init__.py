"""Benchmarks of grace_kernels and grace_edit; installed as `grace_bench`, run by `grace bench`.

suite.py       the parts, the environment, one run from beginning to end
rows.py        what a part returns: rows, their files, the ratios between them
timing.py      interleaved rounds, warm and cold caches, the bandwidth of reading
operators.py   parts nearest, lookup, adapt_ and call; peers.py is what they stand beside
pruned.py      part pruned: lookups through a sketch
model.py       part model: an edited GPT-2 beside the unedited one and published.py's way
edits.py       parts edits and growth
instructions/  instruction counts of fixed lookups beside committed ones, without a clock
activations.py data like a pretrained model's activations
page.py        Markdown from rows; pictures.py draws them
gpu_check/     builds, checks and measures the GPU kernels; gpu.py turns its times into rows
"""
