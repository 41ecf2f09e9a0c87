//! Claims, and the ExplanationOfBenefits that answer them.

use super::*;

fn money(cents: u64) -> String {
    format!(r#"{{"value":{}.{:02},"currency":"USD"}}"#, cents / 100, cents % 100)
}

fn claim_lines(page: &Page<'_>, random: &mut Random, number: u32) -> (String, u64) {
    let time = page.encounter_time(number);
    let (mut items, mut total) = (Vec::new(), 0);
    for sequence in 1..=1 + random.below(3) {
        let cents = 4_000 + random.below(40_000);
        total += cents;
        let (code, name) = *random.pick(&PROCEDURES);
        items.push(format!(r#"{{"sequence":{sequence},"productOrService":{{"coding":[{{"system":"http://snomed.info/sct","code":"{code}","display":"{name}"}}],"text":"{name}"}},"servicedPeriod":{{"start":"{}","end":"{}"}},"net":{},"encounter":[{{"reference":"{}"}}]}}"#,
            time.to_rfc3339(), (time + Duration::minutes(30)).to_rfc3339(), money(cents), page.reference("Encounter",
                page.patient, number)));
    }
    (items.join(","), total)
}

const CLAIM_TYPE: &str =
    r#"{"coding":[{"system":"http://terminology.hl7.org/CodeSystem/claim-type","code":"institutional"}]}"#;

pub(super) fn claim(page: &mut Page<'_>, random: &mut Random, number: u32) {
    let (items, total) = claim_lines(page, random, number);
    let time = page.encounter_time(number);
    put!(
        page,
        r#""status":"active","type":{CLAIM_TYPE},"use":"claim","patient":{{"reference":"{}"}},"billablePeriod":{{"start":"{}","end":"{}"}},"created":"{}","provider":{{"reference":"{}"}},"priority":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/processpriority","code":"normal"}}]}},"insurance":[{{"sequence":1,"focal":true,"coverage":{{"reference":"{}"}}}}],"item":[{items}],"total":{}"#,
        page.subject(),
        time.to_rfc3339(),
        (time + Duration::minutes(30)).to_rfc3339(),
        time.to_rfc3339(),
        page.reference("Organization", 0, page.patient % SITES),
        page.reference("Coverage", page.patient, 0),
        money(total)
    );
}

pub(super) fn explanation_of_benefit(page: &mut Page<'_>, random: &mut Random, number: u32) {
    let (items, total) = claim_lines(page, random, number);
    let time = page.encounter_time(number);
    let adjudicated = items.replace(r#""net":"#, r#""adjudication":[{"category":{"coding":[{"system":"https://bluebutton.cms.gov/resources/variables/line_coinsrnc_amt","code":"coinsurance","display":"Line Beneficiary Coinsurance Amount"}]},"amount":{"value":12.50,"currency":"USD"}},{"category":{"coding":[{"system":"https://bluebutton.cms.gov/resources/variables/line_sbmtd_chrg_amt","code":"submitted","display":"Line Submitted Charge Amount"}]},"amount":{"value":62.40,"currency":"USD"}}],"net":"#);
    put!(
        page,
        r##""contained":[{{"resourceType":"ServiceRequest","id":"referral","status":"completed","intent":"order","subject":{{"reference":"{subject}"}},"requester":{{"reference":"{doctor}"}},"performer":[{{"reference":"{doctor}"}}]}},{{"resourceType":"Coverage","id":"coverage","status":"active","type":{{"text":"Medicare"}},"beneficiary":{{"reference":"{subject}"}},"payor":[{{"display":"Medicare"}}]}}],"identifier":[{{"system":"https://bluebutton.cms.gov/resources/variables/clm_id","value":"{patient}{number}"}}],"status":"active","type":{CLAIM_TYPE},"use":"claim","patient":{{"reference":"{subject}"}},"billablePeriod":{{"start":"{start}","end":"{end}"}},"created":"{start}","insurer":{{"display":"Medicare"}},"provider":{{"reference":"{site}"}},"referral":{{"reference":"#referral"}},"claim":{{"reference":"{claim}"}},"outcome":"complete","insurance":[{{"focal":true,"coverage":{{"reference":"#coverage","display":"Medicare"}}}}],"item":[{adjudicated}],"total":[{{"category":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/adjudication","code":"submitted","display":"Submitted Amount"}}],"text":"Submitted Amount"}},"amount":{total}}}],"payment":{{"amount":{paid}}}"##,
        subject = page.subject(),
        doctor = page.reference("Practitioner", 0, page.doctor(number)),
        patient = page.patient,
        start = time.to_rfc3339(),
        end = (time + Duration::days(365)).to_rfc3339(),
        site = page.reference("Organization", 0, page.patient % SITES),
        claim = page.reference("Claim", page.patient, number),
        total = money(total),
        paid = money(total * 8 / 10)
    );
}
