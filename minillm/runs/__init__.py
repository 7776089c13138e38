"""A training run as a thing that can be stopped, resumed and reported: recipes, stages, its keeper, exams."""
