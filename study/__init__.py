"""The experiments and what is made of them: runs, results, claims, figures, diagnostics, `explain`, the page, the benchmark.

And the lesson: what its notebook needs, its exercises, its faulty runs, and the leaderboard of its open task.
"""
