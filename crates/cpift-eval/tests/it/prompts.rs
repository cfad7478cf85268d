//! Prompts of cpift-eval: harness prompts and few-shot examples.

use std::fs;

use cpift_testkit::model::{row, write_rows};
use serde_json::{Value, json};

use crate::common::{Fixture, continue_by, outputs, question, read_json, task};

const SPLIT: &str = r"split = '(?s)^(?P<passage>.*)\n\n(?P<question>.*)\n\nA\. '";

#[test]
fn the_harness_prompt_of_multiple_choice_scores_the_options_text() {
    let f = Fixture::new();
    let user = "All birds fly.\nSo they say.\n\nWho flies?\n\nA. birds\nB. é";
    let rows = [question(user, json!(["birds", "é"]), 0), question(user, json!(["é", "birds"]), 0)];
    write_rows(&f.dir.path().join("data/pick/eval.jsonl"), &rows);
    fs::write(&f.tasks, task("pick", &format!("metric = 'choice'\n{SPLIT}"))).unwrap();
    f.eval("a", &["--prompt", "harness"]).ok();
    let outputs = outputs(&f.out("a"));
    let prompt = "Passage: All birds fly.\nSo they say.\nQuestion: Who flies?\nChoices:\nA. birds\nB. é\nAnswer:";
    assert_eq!(outputs[0]["prompt"], prompt);
    for output in &outputs {
        let ll: Vec<f64> = output["log_likelihoods"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        let lengths = if output["row"] == 1 { [5.0, 1.0] } else { [1.0, 5.0] };
        let score = |first: bool| json!(f64::from(u8::from(first)));
        assert_eq!(output["acc"], score(ll[0] >= ll[1]), "{output}");
        assert_eq!(output["acc_norm"], score(ll[0] / lengths[0] >= ll[1] / lengths[1]), "code points: {output}");
    }
    let scores = read_json(&f.out("a").join("scores.json"));
    assert_eq!(scores["tasks"][0]["settings"]["prompt"], "harness");
    assert_eq!(scores["tasks"][0]["also"]["acc_norm"]["n"], 2);
    write_rows(
        &f.dir.path().join("data/pick/eval.jsonl"),
        &[rows[0].clone(), question("no parts", json!(["x", "y"]), 0)],
    );
    f.eval("b", &["--prompt", "harness"]).bad_input(&["pick/eval.jsonl", "line 2", "split", "no parts"]);
    fs::write(&f.tasks, task("pick", "metric = 'choice'\nsplit = '('")).unwrap();
    f.eval("b", &[]).bad_input(&["tasks.toml", "split", "regular expression"]);
}

#[test]
fn equal_options_tie_and_the_first_is_taken() {
    let f = Fixture::new();
    write_rows(&f.dir.path().join("data/pick/eval.jsonl"), &[question("q", json!(["same", "same"]), 1)]);
    fs::write(&f.tasks, task("pick", "metric = 'choice'")).unwrap();
    f.eval("a", &["--prompt", "harness"]).ok();
    let output = &outputs(&f.out("a"))[0];
    assert_eq!((&output["extracted"], &output["acc"], &output["acc_norm"]), (&json!("A"), &json!(0.0), &json!(0.0)));
    assert_eq!(output["prompt"], "Question: q\nChoices:\nA. same\nB. same\nAnswer:", "no passage, no such line");
}

#[test]
fn examples_come_from_the_training_file_by_the_seed() {
    let f = Fixture::new();
    let train: Vec<Value> =
        (0..9).map(|i| json!({"question": format!("q{i}"), "answer": format!("#### {i}")})).collect();
    write_rows(&f.dir.path().join("data/count/train.jsonl"), &train);
    // The first question is also in the training file.
    let eval: Vec<Value> =
        (3..5).map(|i| json!({"question": format!("q{i}"), "answer": format!("#### {i}")})).collect();
    write_rows(&f.dir.path().join("data/count/eval.jsonl"), &eval);
    fs::write(&f.tasks, task("count", "metric = 'gsm8k'\nmax_new_tokens = 4")).unwrap();
    let prompts = |out: &str, more: &[&str]| -> Vec<String> {
        f.eval(out, &[&["--few-shot", "2"], more].concat()).ok();
        outputs(&f.out(out)).iter().map(|o| o["prompt"].as_str().unwrap().to_owned()).collect()
    };
    let harness = prompts("a", &["--prompt", "harness"]);
    for (prompt, own) in harness.iter().zip(["q3", "q4"]) {
        let parts: Vec<&str> = prompt.split("\n\n").collect();
        assert_eq!((parts.len(), parts[2]), (3, format!("Question: {own}\nAnswer:").as_str()), "{prompt}");
        for example in &parts[..2] {
            let number = example.strip_prefix("Question: q").unwrap().chars().next().unwrap();
            assert_eq!(*example, format!("Question: q{number}\nAnswer: #### {number}"));
            assert_ne!(format!("q{number}"), own, "the row's own question");
        }
    }
    assert_eq!(harness, prompts("b", &["--prompt", "harness", "--batch-size", "1"]));
    assert_ne!(harness, prompts("c", &["--prompt", "harness", "--seed", "5"]));
    assert_eq!(prompts("d", &[])[0].matches("<|im_start|>assistant").count(), 3, "turns of a chat prompt");
    f.eval("e", &["--few-shot", "9"]).bad_input(&["count/train.jsonl", "more than 9", "found: 9"]);
}

#[test]
fn options_that_stand_in_a_prompt_twice_are_warned_of_once() {
    let f = Fixture::new();
    let file = f.dir.path().join("data/pick/eval.jsonl");
    let user = "All birds fly.\n\nWho flies?\n\nA. birds\nB. cats";
    let rows = [question(user, json!(["birds", "cats"]), 0), question(user, json!(["birds", "cats"]), 1)];
    write_rows(&file, &rows);
    let warnings = |out: &str, split: &str, style: &str| {
        fs::write(&f.tasks, task("pick", &format!("metric = 'choice'\n{split}"))).unwrap();
        let stderr = f.eval(out, &["--prompt", style]).ok().stderr;
        assert_eq!(stderr.contains("split"), stderr.contains("options are in the prompt twice"), "{stderr}");
        stderr.matches("options are in the prompt twice").count()
    };
    assert_eq!(warnings("a", "", "harness"), 1);
    assert_eq!(warnings("b", SPLIT, "harness"), 0);
    assert_eq!(warnings("c", "", "chat"), 0);
    let mut apart = rows.clone();
    apart.iter_mut().for_each(|row| row["question"] = json!("Who flies?"));
    write_rows(&file, &apart);
    assert_eq!(warnings("d", "", "harness"), 0);
    write_rows(&file, &[question("Do birds eat cats?", json!(["birds", "cats"]), 0)]);
    assert_eq!(warnings("e", "", "harness"), 0, "words of the question are no options");
}

#[test]
fn an_option_is_scored_by_the_tokens_that_the_conversation_has_for_it() {
    let f = Fixture::new();
    write_rows(&f.dir.path().join("data/pick/eval.jsonl"), &[question("q", json!(["x", "y"]), 1)]);
    fs::write(&f.tasks, task("pick", "metric = 'choice'")).unwrap();
    let config = f.model.join("tokenizer_config.json");
    let with = |out: &str, answer: &str, prompt: &str| {
        let template = format!(
            "{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ '<|im_start|>' + m.content }}}}{{% else %}}{answer}{{% endif %}}\
             {{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
        );
        fs::write(&config, json!({"eos_token": "<|im_end|>", "chat_template": template}).to_string()).unwrap();
        f.eval(out, &[]).ok();
        outputs(&f.out(out))[0].clone()
    };
    // The template writes the space (or the think block) before an answer only in the rendered
    // turn.
    let spaced = with("a", "{{ ' ' + m.content + '<|im_end|>' }}", "");
    assert_eq!(spaced["prompt"], "<|im_start|>q ");
    let block = with("b", "{{ '<think></think>' + m.content + '<|im_end|>' }}", "<think>");
    assert_eq!(block["prompt"], "<|im_start|>q<think></think>");
    // A template with the space in its generation prompt gives the same scores.
    let same = with("c", "{{ ' ' + m.content + '<|im_end|>' }}", " ");
    assert_eq!(same["log_likelihoods"], spaced["log_likelihoods"]);
    assert_ne!(same["log_likelihoods"], block["log_likelihoods"]);
}

#[test]
fn generated_answers_end_with_the_turn_and_have_no_think_block() {
    let f = Fixture::new();
    let ids = |text: &str| text.bytes().map(usize::from).collect::<Vec<_>>();
    // After the line break of the prompt: a draft, its end, the answer, the end of the turn, more.
    continue_by(&f, &[ids("\ndr"), vec![258], ids("ok"), vec![257], ids("XYZ")].concat());
    write_rows(&f.dir.path().join("data/copy/eval.jsonl"), &[row("q", "ok")]);
    fs::write(&f.tasks, task("copy", "metric = 'exact-match'\nmax_new_tokens = 9")).unwrap();
    let with = |out: &str, mark: &str, eos: &str| {
        let template = format!(
            "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content{mark} }}}}<|im_end|>\n{{% endfor %}}\
             {{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
        );
        let config = json!({"eos_token": eos, "chat_template": template});
        fs::write(f.model.join("tokenizer_config.json"), config.to_string()).unwrap();
        f.eval(out, &[]).ok();
        let output = outputs(&f.out(out)).remove(0);
        (output["output"].as_str().unwrap().to_owned(), output["reasoning"].clone(), output["exact_match"].clone())
    };
    let split = ".split('</think>')[-1]";
    for (i, eos) in ["<|im_end|>", "<|im_start|>"].into_iter().enumerate() {
        let found = with(&format!("thinks{i}"), split, eos);
        assert_eq!(found, ("ok".into(), json!("dr"), json!(1.0)), "{eos}");
        // A template that knows no think block: all that was generated is the answer.
        assert_eq!(with(&format!("plain{i}"), "", eos), ("drok".into(), Value::Null, json!(0.0)), "{eos}");
    }
}

#[test]
fn template_arguments_change_prompts_options_and_losses() {
    let f = Fixture::new();
    write_rows(&f.dir.path().join("data/pick/eval.jsonl"), &[question("q", json!(["x", "y"]), 1)]);
    let answer = "{% if think is defined %}({{ think }}){% endif %}{{ m.content }}<|im_end|>";
    let template = format!(
        "{{% for m in messages %}}{{% if m.role == 'user' %}}<|im_start|>{{{{ m.content }}}}{{% else %}}{answer}{{% endif %}}\
         {{% endfor %}}{{% if add_generation_prompt %}}{{% if think is defined %}}({{{{ think }}}}){{% endif %}}{{% endif %}}"
    );
    let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
    fs::write(f.model.join("tokenizer_config.json"), config.to_string()).unwrap();
    let scored = |out: &str, metric: &str, args: &str| {
        fs::write(&f.tasks, task("pick", &format!("metric = '{metric}'\nmax_new_tokens = 2\n{args}"))).unwrap();
        f.eval(out, &[]).ok();
        let settings = read_json(&f.out(out).join("scores.json"))["tasks"][0]["settings"]["template_args"].clone();
        (outputs(&f.out(out)).remove(0), settings)
    };
    let args = "template_args = { think = false }";
    let [(plain, none), (chosen, given)] = [scored("a", "choice", ""), scored("b", "choice", args)];
    assert_eq!((&plain["prompt"], &chosen["prompt"]), (&json!("<|im_start|>q"), &json!("<|im_start|>q(False)")));
    assert_eq!((none, given), (json!({}), json!({"think": false})));
    assert_ne!(plain["log_likelihoods"], chosen["log_likelihoods"]);
    assert_ne!(plain["nll"], chosen["nll"]);
    let generated = scored("c", "exact-match", args).0;
    assert_eq!(generated["prompt"], "<|im_start|>q(False)");
}
