# each token goes to both
SHARES = [0.5, 0.5]
# 2 * (P0 / 2 + P1 / 2) = P0 + P1 = 1
BALANCE = 1
ACTIVE = 1
# the two weights are p0 and p1 = 1 - p0, and the experts differ
ROUTER_LEARNS = True
