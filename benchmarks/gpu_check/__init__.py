"""Build, check and measure the GPU kernels in one command: `python -m benchmarks.gpu_check`.

Four stages (`build`, `correct`, `graphs`, `bench`), each a list of rows. A row is one line in
`rows.jsonl` the moment it ends, so a run that is cut off loses one row, and a second run with the
same folder goes on with what is missing. Every stage runs in a process of its own, which is
replaced when a row takes it down (an illegal address ends a CUDA context for good).

    __main__.py   arguments, the four stages in turn, the exit status
    journal.py    rows, their records, the process that runs them and the one that watches it
    process.py    a program with a time limit
    place.py      the GPU, or for a rehearsal the CPU: capture, replay, timing, environment
    build.py      the compiled libraries on this machine; warm.py fills Triton's cache
    correct.py    bits against the CPU; problems.py makes the inputs, special.py the odd cases,
                  sanitizer.py runs compute-sanitizer
    graphs.py     capture, replay and edits in between; nodes.py counts, served.py runs a model
    bench.py      times; peers.py is what they stand beside
    report.py     JSON, CSV and Markdown from the records; picture.py draws
"""
