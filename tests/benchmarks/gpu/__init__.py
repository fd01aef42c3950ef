"""`python -m tests.benchmarks.gpu`: all figures of a GPU as one table, in under about 8 minutes.

Models have the shapes of Llama 3.2 1B and Llama 3.1 8B and random weights, rows are random tokens: nothing is
downloaded. Every part runs in a process of its own; what fails is a row with its reason, the others go on.
`python -m tests.benchmarks.gpu tiny` runs the same code on the CPU, with tiny shapes, in under a minute.
"""

BATCH_SIZES = (1, 2, 4, 8)  # of the small trials
