"""Raw text in, clean text out: the steps of chapters 02 to 06 as a run that streams, resumes and accounts for all."""
