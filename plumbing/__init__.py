"""Files, checkpoints, the log, processes, batches and flags: never needed to understand FPA.

plumbing/ knows no loss, no toy and no model.
"""
