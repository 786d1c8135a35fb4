//! Plays an artifact through the C interface, without a crate:
//!   K=$(python -c 'import kiln; print(kiln.__path__[0])')
//!   rustc -O play.rs -L "$K/lib" -C link-arg=-Wl,-rpath,"$K/lib" && ./play ARTIFACT "Why is the sky blue?" 100
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::io::Write;
use std::ptr::{null, null_mut};

#[repr(C)]
struct Model(c_void);
#[repr(C)]
struct Session(c_void);
type OnToken = extern "C" fn(i64, *const c_char, usize, *mut c_void) -> c_int;

#[link(name = "kiln")]
extern "C" {
    fn kiln_error() -> *const c_char;
    fn kiln_model_load(path: *const c_char, options: *const c_void, model: *mut *mut Model) -> c_int;
    fn kiln_model_free(model: *mut Model) -> c_int;
    fn kiln_encode(model: *const Model, text: *const u8, bytes: usize, how: c_int, ids: *mut i64, capacity: usize, count: *mut usize) -> c_int;
    fn kiln_session_open(model: *const Model, options: *const c_void, session: *mut *mut Session) -> c_int;
    fn kiln_session_free(session: *mut Session) -> c_int;
    fn kiln_prefill(session: *mut Session, ids: *const i64, count: usize, next: *mut i64) -> c_int;
    fn kiln_generate(session: *mut Session, most: i64, past_eog: c_int, on_token: OnToken, user: *mut c_void, stop: *mut c_int) -> c_int;
}

fn check(status: c_int) -> Result<(), String> {
    match status {
        0 => Ok(()),
        _ => Err(unsafe { CStr::from_ptr(kiln_error()) }.to_string_lossy().into_owned()),
    }
}

extern "C" fn show(token: i64, text: *const c_char, _bytes: usize, user: *mut c_void) -> c_int {
    unsafe { *(user as *mut usize) += (token >= 0) as usize };
    print!("{}", unsafe { CStr::from_ptr(text) }.to_string_lossy());
    std::io::stdout().flush().is_err() as c_int
}

fn play(path: &str, prompt: &str, most: i64) -> Result<usize, String> {
    let path = CString::new(path).map_err(|e| e.to_string())?;
    let (mut model, mut session) = (null_mut(), null_mut());
    let (mut count, mut next, mut stop, mut tokens) = (0usize, 0i64, 0, 0usize);
    unsafe {
        check(kiln_model_load(path.as_ptr(), null(), &mut model))?;
        check(kiln_encode(model, prompt.as_ptr(), prompt.len(), 0, null_mut(), 0, &mut count))?;
        let mut ids = vec![0i64; count];
        check(kiln_encode(model, prompt.as_ptr(), prompt.len(), 0, ids.as_mut_ptr(), count, &mut count))?;
        check(kiln_session_open(model, null(), &mut session))?;
        check(kiln_prefill(session, ids.as_ptr(), count, &mut next))?;
        check(kiln_generate(session, most, 0, show, &mut tokens as *mut usize as *mut c_void, &mut stop))?;
        check(kiln_session_free(session))?;
        check(kiln_model_free(model))?;
    }
    Ok(tokens)
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, path, prompt, most] = &arguments[..] else {
        eprintln!("usage: play ARTIFACT PROMPT TOKENS");
        std::process::exit(2);
    };
    match most.parse().map_err(|e| format!("{most}: {e}")).and_then(|most| play(path, prompt, most)) {
        Ok(tokens) => eprintln!("\n{tokens} tokens"),
        Err(text) => {
            eprintln!("play: error: {text}");
            std::process::exit(1);
        }
    }
}
