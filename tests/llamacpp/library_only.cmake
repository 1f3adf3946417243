# Read by CMake where llama.cpp's own project begins: builds the library that the tests load, and
# nothing of what serves chat on top of it, which takes longer to compile than the library.
set(LLAMA_BUILD_COMMON OFF)
