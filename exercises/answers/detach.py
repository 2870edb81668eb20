# dL/dz_j = 2 * dw/dp * p0 * ((j = 0) - p_j), and p0 * (..) = .25, -.15, -.1. dw/dp is 1 if p is there
# once for the gradient, and 0 if it cancels
STRAIGHT_THROUGH = [0.5, -0.3, -0.2]
WITHOUT_DETACH = [0, 0, 0]
SWITCH = [0.5, -0.3, -0.2]
RENORMALISED = [0, 0, 0]
