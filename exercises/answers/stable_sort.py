# index_copy_ puts the row of a pair at the number of the pair, wherever it was sorted to
LOOP = 'b'
# two places each (1 * 6 / 3), and expert 0 has three tokens: one is dropped, and the order says which
BREAKS = [0, 1, 0, 0, 2, 1]
# nobody is dropped
HOLDS = [0, 0, 1, 1, 2, 2]
