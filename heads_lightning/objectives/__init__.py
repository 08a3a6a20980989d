"""What is learned from a row of tokens: inputs, aligned labels and weights, as a pure function of (seed, epoch, index) in NumPy.

One file for each option of `objective=`, and what they share:

    base.py         the contract, random bits of a sample, schedules        cuts.py, syntax.py   where fill-in-the-middle cuts a text
    cells.py        pieces of many rows moved at once                      fim_layout.py        order of pieces around sentinels

Labels are aligned here and nowhere else: position i is scored on labels[i], and a head shifts nothing.
"""
