"""What is known of a run: its folder, written at once and line by line, and the copy of it in MLflow.

    open_run.py       opens a run and hands out its RunLog; sends what MLflow missed
    run_folder.py     the files of a run folder and their records        run_log.py       what code that runs may log
    provenance.py     commit, versions, machine                          process.py       ranks, signals, how a run ended
    sender_process.py the process that copies, seen from training        mlflow_sync.py   that process
    mlflow_run.py     one run as a copy; _points, _events, _header, _calls, _limits are its parts
    mlflow_store.py   addresses of stores; _opening and _lookup need MLflow

The folder is the truth: training never waits for a store. Nothing here imports torch or Lightning, and MLflow only where it is asked.
"""
