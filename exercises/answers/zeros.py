# eight equal logits, for every token: topk breaks the tie in the same way each time
BUSIEST = 1
# 8 * (1 * 1/8), and 0 for all others
BALANCE = 1
LEARNING = 1
REASON = 'c'
