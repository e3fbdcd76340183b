int gguf_bench_placeholder;
