"""Sweeps: many runs from one command, each in a process of its own, with a ledger that outlives all of them.

    sweep.json       command line and settings          ledger.jsonl     what happened to every cell, in order
    cells/HASH.yaml  the resolved config of a cell      0/ 1/ 2/ …       run folders, one for each cell
    logs/N.log       what a cell printed                artifacts/       pictures and table of the comparison
    summary.txt      the ranked table

A cell is known by the hash of its resolved config without what only says where it runs, so the same experiment is the same cell in
every command that goes on with the sweep. Nothing here imports torch before a cell does.
"""
