"""The experiments and what is made of them: runs, results, claims, figures, diagnostics, `explain`, the page, the benchmark."""
