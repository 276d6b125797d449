"""CPU kernels in C++ and their Python, compiled with g++ -march=native at first use."""
