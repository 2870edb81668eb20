# token 0 goes to experts 0 and 1, then 0 and 2, 1 and 2, 0 and 1, 2 and 1
COUNTS = [3, 4, 3, 0]
# f = counts / 10 = .3 .4 .3 0; P = .3 .3 .28 .12; 4 * (.09 + .12 + .084 + 0)
LOSS = 1.176
# E * f / N = 4/5 of f, the same for each token
GRADIENT = [0.24, 0.32, 0.24, 0]
