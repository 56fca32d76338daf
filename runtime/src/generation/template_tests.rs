//! Templates in the style of the field, and the exact text they must give.

use serde_json::{Map, json};

use super::*;

fn render(source: &str, messages: &[(&str, &str)], prompt: bool, extra: serde_json::Value) -> Result<String> {
    let template = ChatTemplate::with_clock(source, Some("<s>"), Some("</s>"), || 1_735_689_599)?;
    let messages: Vec<Message> = messages.iter().map(|(role, text)| Message::new(*role, *text)).collect();
    let extra = extra.as_object().cloned().unwrap_or_default();
    template.render(&messages, prompt, &extra)
}

const CHATML: &str = "{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content.strip() + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
";

#[test]
fn chatml() {
    let text = render(CHATML, &[("user", "  Hello <b> & 'you' ")], true, json!({})).unwrap();
    let expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello <b> & 'you'<|im_end|>\n\
        <|im_start|>assistant\n";
    assert_eq!(text, expected);
    let text = render(CHATML, &[("system", "S"), ("user", "U")], false, json!({})).unwrap();
    assert_eq!(text, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n");
}

#[test]
fn blocks_are_trimmed_and_tokens_are_known() {
    let source = "{{ bos_token }}\n  {% if true %}\nx\n  {% endif %}\n{{ eos_token }}\n";
    assert_eq!(render(source, &[], false, json!({})).unwrap(), "<s>\nx\n</s>");
}

#[test]
fn an_absent_token_is_undefined() {
    let template = ChatTemplate::new("[{{ bos_token }}]{{ eos_token is defined }}", None, None).unwrap();
    let text = template.render(&[], false, &Map::new()).unwrap();
    assert_eq!(text.to_lowercase(), "[]false");
}

#[test]
fn python_methods_slices_namespaces_and_loop_controls() {
    let source = "{%- set ns = namespace(n=0) -%}
        {%- for m in messages[1:] -%}
            {%- if m.role == 'skip' -%}{%- continue -%}{%- endif -%}
            {%- if m.role == 'stop' -%}{%- break -%}{%- endif -%}
            {%- set ns.n = ns.n + 1 -%}
            {{- m['content'].split('|')[-1].upper() + ('!' if m.content.startswith('a') else '?') -}}
        {%- endfor -%}
        {{- ns.n -}}";
    let messages =
        [("x", "zero"), ("u", "a|one"), ("skip", "no"), ("u", "two"), ("stop", "no"), ("u", "three")];
    assert_eq!(render(source, &messages, false, json!({})).unwrap(), "ONE!TWO?2");
}

/// Expectations from Python's `json.dumps`.
#[test]
fn tojson_is_pythons() {
    let tools =
        json!([{"name": "f<>&'", "b": 1, "a": [1.0, 2.5, null, true], "é": "z\n\"", "e": {}, "l": []}]);
    let dense = r#"[{"name": "f<>&'", "b": 1, "a": [1.0, 2.5, null, true], "é": "z\n\"", "e": {}, "l": []}]"#;
    assert_eq!(render("{{ tools|tojson }}", &[], false, json!({ "tools": tools })).unwrap(), dense);
    let small = json!({"x": {"b": [1, "é"], "a": {}}});
    let indented = "{\n  \"b\": [\n    1,\n    \"é\"\n  ],\n  \"a\": {}\n}";
    assert_eq!(render("{{ x|tojson(indent=2) }}", &[], false, small.clone()).unwrap(), indented);
    assert_eq!(render("{{ x|tojson(2) }}", &[], false, small.clone()).unwrap(), indented);
    let options = "{{ x|tojson(sort_keys=true, ensure_ascii=true, separators=[',', ':']) }}";
    assert_eq!(render(options, &[], false, small).unwrap(), "{\"a\":{},\"b\":[1,\"\\u00e9\"]}");
    let messages = render("{{ messages|tojson }}", &[("user", "hi")], false, json!({})).unwrap();
    assert_eq!(messages, r#"[{"role": "user", "content": "hi"}]"#);
}

#[test]
fn items_keep_their_order_and_extra_variables_win() {
    let source = "{% for k, v in x.items() %}{{ k }}={{ v }};{% endfor %}{{ add_generation_prompt }}";
    let extra = json!({"x": {"z": 1, "a": 2}, "add_generation_prompt": "mine"});
    assert_eq!(render(source, &[], true, extra).unwrap(), "z=1;a=2;mine");
}

#[test]
fn dates_come_from_the_clock() {
    let text = render("{{ strftime_now('%d %b %Y') }}", &[], false, json!({})).unwrap();
    assert_eq!(text, "31 Dec 2024");
    assert_eq!(
        render("{{ strftime_now('%Q') }}", &[], false, json!({})).unwrap_err().code(),
        "template/render"
    );
}

#[test]
fn generation_blocks_are_content() {
    let source = "a {%- generation -%} b {%- endgeneration %} c{% generation %}d{% endgeneration %}";
    assert_eq!(render(source, &[], false, json!({})).unwrap(), "ab cd");
}

#[test]
fn errors_are_typed_and_placed() {
    let refused = render("{{ raise_exception('roles must alternate') }}", &[], false, json!({})).unwrap_err();
    assert_eq!(refused.code(), "template/refused");
    assert!(refused.message().contains("roles must alternate"));
    let syntax = render("x\n{% for %}", &[], false, json!({})).unwrap_err();
    assert_eq!((syntax.code(), syntax.place()), ("template/syntax", Some("chat template line 2")));
    let render_error = render("{{ messages.nothing.at_all }}", &[], false, json!({})).unwrap_err();
    assert_eq!(render_error.code(), "template/render");
}
