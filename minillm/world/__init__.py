"""The own corpus: documents whose truth is known, their exams, the defects planted in them, and what there is to find."""
