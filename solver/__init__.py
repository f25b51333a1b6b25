"""Problems of numbers, solved: formulate, solve, decode; nothing here imports torch."""
