"""Text to batches: prepared once into memory-mapped shards, then read by arithmetic, so that any step can be asked for.

    sources.py, records.py, huggingface.py, tokens.py   where documents come from, one class for each option of `data=`
    tokenizer.py   tokenizers and their special tokens        prepare.py, workers.py, progress.py   documents to shards, once
    shards.py      the files and their index                  stream.py    the n-th sample of an epoch, shuffled without a list
    packing.py     whole documents in rows                    mixing.py    several sources by weight
    scored.py      texts with values, for value heads         datamodule.py   steps of micro-batches for this rank

What a sample becomes is the objective's; nothing here knows a model.
"""
