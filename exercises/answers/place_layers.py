# (0, 1) will do as well. Seen with (0, 2), (0, 1), (0,), (1, 2), (2,), (1,) and without mixtures:
# 0.914, 0.918, 0.921, 0.954, 0.971, 0.980, 0.990 (a CPU with AVX-512; 0.920, 0.927, 0.922 and 0.949 of the
# first four with AVX2, by ATEN_CPU_CAPABILITY=avx2)
MOE_LAYERS = (0, 2)
