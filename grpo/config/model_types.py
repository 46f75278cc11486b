"""Architectures by the `model_type` of their config.json: whose packed forward is proven, and why another is refused.

The tests compare SUPPORTED, one by one, with the plain forward of transformers, and both tables with docs/models.md.
"""

_PROVEN = """
afmoe apertus arcee aria_text axk1 cohere cohere2 cohere2_moe ctrl cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1
ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe
glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared
helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe laguna llama llama4_text longcat_flash mellum
mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 olmoe opt
persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
youtu
"""
SUPPORTED = frozenset(_PROVEN.split())

_ALIBI = "adds ALiBi biases or another bias by position to its attention scores"
_STATE = "has layers that carry a state from token to token (state space, recurrent, convolution or linear attention)"
_OWN = "computes its attention in code of its own, beside transformers' attention interface"
_TWO_WAYS = "is an encoder, or a decoder made of one, whose attention sees both ways"
_ENCODER = "is the decoder of an encoder-decoder with cross attention"
_MEDIA = "is a multimodal model, whose text part is not loaded alone"
_PROMPT = "may see a prompt both ways, by token types that the packed forward does not have"
_DRAFT = "drafts for another model, whose states it reads"
_TERNARY = "rounds its weights to three values as it computes"
_NO_ENGINE = "is none that vLLM can sample from"
_SPARSE = "chooses by content which tokens its attention sees (sparse attention)"

_REASONS = {
    _ALIBI: "bloom mpt",
    _PROMPT: "hrm_text",
    _DRAFT: "gemma4_assistant gemma4_unified_assistant",
    _TERNARY: "bitnet",
    _NO_ENGINE: "biogpt",
    _STATE: """
        bamba falcon_h1 falcon_mamba gemma3n_text granitemoehybrid inkling_text jamba kimi_linear lfm2 lfm2_moe
        mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text
        recurrent_gemma rwkv xlstm zamba zamba2 zaya
    """,
    _OWN: "codegen cpmant falcon gpt_neo gpt_neox_japanese gptj openai-gpt xglm",
    _TWO_WAYS: """
        bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert modernbert-decoder reformer
        rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
    """,
    _ENCODER: """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp musicgen musicgen_melody pegasus plbart
        prophetnet t5 trocr whisper
    """,
    _MEDIA: """
        blt cohere_compass_text emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified gemma4_unified_text git got_ocr2
        llama4 minimax_m3_vl_text mllama moshi phi4_multimodal qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl
        qwen4_exp
    """,
    _SPARSE: "axk2 deepseek_v32 deepseek_v4 doge glm_moe_dsa hy_v4",
}

REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""What stands against each, after "its architecture"."""
